"""From events to what people see: the trace, metrics, a progress bar and a dashboard. It never holds anyone up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from ormo_rpc.runtimes.job import JobLike
from ormo_rpc.server.events import Event, Statistics
from ormo_rpc.storage.run_directory import RunDirectory, write_summary
from ormo_rpc.worker.evaluation import Evaluation


class Dashboard(Protocol):
    """Something that shows the course of a run."""

    def show(self, row: Mapping[str, Any], statistics: Statistics) -> None:
        """Show one row of metrics."""
        ...

    def close(self, summary: Mapping[str, Any]) -> None:
        """Show how it ended."""
        ...


@dataclass(frozen=True)
class Position:
    """How far the records were at one moment.

    Attributes:
        trace_bytes: The length of ``trace.jsonl``, which is on disk up to there.
        metrics_bytes: Of ``metrics.jsonl``, likewise.
        statistics: The running figures over the events so far, as `Statistics.state_dict` has them.
    """

    trace_bytes: int
    metrics_bytes: int
    statistics: dict[str, Any]


class Recorder:
    """Collects events from any thread; `pump`, called by one thread again and again, writes them down.

    Args:
        job: The run.
        directory: Where trace and metrics go.
        dashboards: Who else is told.
        clock: Seconds since the run began.
        figures: Further running figures for every row, such as the time that the lock was held.
    """

    def __init__(
        self,
        job: JobLike,
        directory: RunDirectory,
        dashboards: Sequence[Dashboard],
        clock: Callable[[], float],
        figures: Callable[[], Mapping[str, float]],
    ) -> None:
        self.job = job
        self.directory = directory
        self.dashboards = dashboards
        self.clock = clock
        self.figures = figures
        self.statistics = Statistics()
        self.evaluation: Evaluation | None = None
        self._events: SimpleQueue[Event | Callable[[Position], None]] = SimpleQueue()
        self._last = (0.0, 0)
        """Time of the last row, and how many gradients this run had applied by then (a resumed one does not begin at 0)."""

    def record(self, event: Event) -> None:
        """Take one event; called on the update path, it only puts it into a queue."""
        self._events.put(event)

    def when_written(self, callback: Callable[[Position], None]) -> None:
        """Call back, in `pump`, as soon as the events so far are written and none of the later ones."""
        self._events.put(callback)

    def pump(self, *, now: bool = False) -> None:
        """Write down what has come, and a row of metrics if it is time for one, or ``now``."""
        while True:
            try:
                event = self._events.get_nowait()
            except Empty:
                break
            if isinstance(event, Event):
                self.statistics.observe(event)
                self.directory.write_event(event)
            else:
                event(self._position())
        seconds, iteration = self.clock(), self.statistics.iterations
        if self.statistics.delays.total() > self._last[1] and (
            now or seconds - self._last[0] >= self.job.config.logger.log_seconds
        ):
            self._row(seconds, iteration)
        self.directory.flush()

    def evaluated(self, iteration: int, seconds: float, evaluation: Evaluation) -> None:
        """Take the result of an evaluation of the parameters that an iteration had left, at that time."""
        self.evaluation = evaluation
        self._show({**self._place(iteration, seconds), "test_loss": evaluation.loss, "test_accuracy": evaluation.accuracy})

    def close(self, summary: Mapping[str, Any]) -> None:
        """Write down the rest and close everything."""
        self.pump(now=True)
        write_summary(self.directory.path, summary)  # first: a dashboard may take its time over the network
        self.directory.close()
        for dashboard in self.dashboards:
            dashboard.close(summary)

    def _position(self) -> Position:
        trace, metrics = self.directory.force()
        return Position(trace, metrics, self.statistics.state_dict())

    def _place(self, iteration: int, seconds: float) -> dict[str, Any]:
        return {"iteration": iteration, "epoch": round(self.job.epoch(iteration), 4), "seconds": round(seconds, 4)}

    def _row(self, seconds: float, iteration: int) -> None:
        then, before = self._last
        applied = self.statistics.delays.total()
        self._last = (seconds, applied)
        self._show(
            {
                **self._place(iteration, seconds),
                "train_loss": self.statistics.loss,
                "lr": self.job.lr(iteration),
                "updates_per_second": round((applied - before) / max(seconds - then, 1e-9), 2),
                "delay_mean": round(self.statistics.delay_mean, 4),
                "delay_max": self.statistics.delay_max,
                **{name: round(value, 6) for name, value in self.figures().items()},
            }
        )

    def _show(self, row: Mapping[str, Any]) -> None:
        self.directory.write_metrics(row)
        for dashboard in self.dashboards:
            dashboard.show(row, self.statistics)
