"""The recorder: from the server's events to trace, metrics and loggers, off the update path."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from ormo_rpc.errors import one_line
from ormo_rpc.loggers import RunLog
from ormo_rpc.loggers.metrics import Measurements, Rows, row_of
from ormo_rpc.loggers.statistics import Statistics
from ormo_rpc.runtimes.job_like import JobLike
from ormo_rpc.server.events import Event, Kind
from ormo_rpc.storage.run_directory import RunDirectory
from ormo_rpc.storage.summary import Summary, write_summary
from ormo_rpc.worker.evaluation import Evaluation

_log = logging.getLogger(__name__)
ROUNDING = 1e-9
"""Relative to a time: sums of virtual times differ by less at one moment."""


@dataclass(frozen=True)
class Offsets:
    """The extent of the records at one moment; a restarted server truncates them to it.

    Attributes:
        trace_bytes: The length of ``trace.jsonl``, which is on disk up to there.
        metrics_bytes: The length of ``metrics.jsonl``, which is on disk up to there.
        statistics: Those of the events so far, as `Statistics.state_dict` returns them.
    """

    trace_bytes: int
    metrics_bytes: int
    statistics: dict[str, Any]


class Recorder:
    """Collects events from any thread; `flush`, called regularly by one thread, writes them.

    Args:
        job: The run.
        directory: Receives trace and metrics.
        clock: Seconds since the run began.
        extra_metrics: Returns metrics by name that the runtime measures itself, such as lock times.
    """

    def __init__(
        self,
        job: JobLike,
        directory: RunDirectory,
        clock: Callable[[], float],
        extra_metrics: Callable[[], Mapping[str, Any]],
    ) -> None:
        self.job = job
        self.directory = directory
        self.clock = clock
        self.extra_metrics = extra_metrics
        self.statistics = Statistics()
        self.evaluation: Evaluation | None = None
        self._queue: SimpleQueue[Event | Callable[[Offsets], None]] = SimpleQueue()
        self._last_row = (0.0, 0)
        """Time of the last gradient in the last row of an interval, and the gradients that this run had applied by then."""
        self._since_row = 0
        """Gradients since that row."""
        self._row_written = 0.0
        """Time at which that row was written."""
        self._starting: Future[list[RunLog]] | None = None
        self._logs: list[RunLog] = []
        self._kept: list[tuple[Mapping[str, Any], Statistics]] = []
        """Rows for logs that have not started yet."""
        self._iterations_between_rows = job.config.logger.iterations_between_rows(job.total_tickets)

    def give_rows_to(self, logs: Future[list[RunLog]]) -> None:
        """Give logs every row from now on too; until they have started rows are kept for them."""
        self._starting = logs
        self._take_logs(wait=False)

    def continue_from(self, statistics: Mapping[str, Any]) -> None:
        """Count on from the statistics in a checkpoint."""
        self.statistics.load_state_dict(statistics)
        self._last_row = (self.statistics.seconds, self.statistics.applied)
        self._row_written = self.statistics.seconds

    def record(self, event: Event) -> None:
        """Put an event into the queue; called on the update path."""
        self._queue.put(event)

    def call_when_written(self, callback: Callable[[Offsets], None]) -> None:
        """Have `flush` call back once all events so far are written, and none of the later ones."""
        self._queue.put(callback)

    def record_evaluation(self, iteration: int, seconds: float, evaluation: Evaluation) -> None:
        """Write a row for an evaluation of the parameters that were current at an iteration and time."""
        self.evaluation = evaluation
        self._log({**self._coordinates(iteration, seconds), **row_of(self.measurements(0.0, 0), Rows.evaluation)})

    def flush(self, *, row: bool = False) -> None:
        """Write the events in the queue, and the rows of metrics that are due, or one more if ``row`` is set.

        What the start of a log raised is raised here.
        """
        self._take_logs(wait=False)
        while True:
            try:
                item = self._queue.get_nowait()
            except Empty:
                break
            if isinstance(item, Event):
                if item.kind is Kind.apply:
                    self._write_row_before(item)
                self.statistics.observe(item)
                self.directory.write_event(item)
            else:
                item(Offsets(*self.directory.sync(), self.statistics.state_dict()))
        now = self.clock()
        due = now - self._row_written >= self.job.config.logger.log_seconds and _is_later(now, self.statistics.seconds)
        if (row or due) and self.statistics.applied > self._last_row[1]:
            self._write_row(now)
        self.directory.flush()

    def measurements(self, seconds: float, applied: int) -> Measurements:
        """Collect what metrics are computed from, rates over ``applied`` gradients in ``seconds``."""
        return Measurements(
            statistics=self.statistics,
            evaluation=self.evaluation,
            seconds=seconds,
            applied=applied,
            extra=self.extra_metrics(),
        )

    def close(self, summary: Summary) -> dict[str, Any]:
        """Write the rest and the summary, end the logs, and return the content of ``summary.json``."""
        self.flush(row=True)
        content = write_summary(self.directory.path, summary)  # first: a logger may take its time over the network
        self.directory.close()
        try:
            self._take_logs(wait=True)
        except Exception as error:  # the run is complete
            _log.warning("the run is over before its logger has started: %s", one_line(error))
        for log in self._logs:
            try:
                log.finish(content)
            except Exception as error:  # a logger of the user's own may raise anything, and the run is complete
                _log.warning("%s cannot be finished: %s", type(log).__name__, one_line(error))
        return content

    def _write_row_before(self, gradient: Event) -> None:
        """Count a gradient, and first write a row where ``logger.log_iterations`` have passed; those of one moment share it."""
        seconds = self.statistics.seconds
        enough = self._since_row >= self._iterations_between_rows
        if enough and _is_later(seconds, self._last_row[0]) and _is_later(gradient.seconds, seconds):
            self._write_row(seconds)
        self._since_row += 1

    def _write_row(self, now: float) -> None:
        """Write a row at the time of its last gradient: the end of a run, with its evaluation, is no time of training."""
        self._row_written, self._since_row = now, 0
        last_seconds, last_applied = self._last_row
        iteration, applied, seconds = self.statistics.iterations, self.statistics.applied, self.statistics.seconds
        self._last_row = (seconds, applied)
        at = self.measurements(seconds - last_seconds, applied - last_applied)
        self._log({**self._coordinates(iteration, seconds), "lr": self.job.lr(iteration), **row_of(at, Rows.interval)})
        self.statistics.recent_metrics.clear()

    def _coordinates(self, iteration: int, seconds: float) -> dict[str, Any]:
        return {"iteration": iteration, "epoch": round(self.job.epoch(iteration), 4), "seconds": round(seconds, 4)}

    def _log(self, row: Mapping[str, Any]) -> None:
        self.directory.write_metrics(row)
        if self._starting is not None:
            self._kept.append((row, copy.deepcopy(self.statistics)))
        for log in self._logs:
            log.log(row, self.statistics)

    def _take_logs(self, *, wait: bool) -> None:
        """Give logs that have started the rows so far; once."""
        if self._starting is None or not (wait or self._starting.done()):
            return
        starting, self._starting = self._starting, None
        self._logs = starting.result()
        for row, statistics in self._kept:
            for log in self._logs:
                log.log(row, statistics)
        self._kept.clear()


def _is_later(seconds: float, than: float) -> bool:
    """Tell if a time is later, by more than the rounding of sums of virtual times."""
    return seconds - than > ROUNDING * max(1.0, seconds)
