"""A session: the server of a run with all that records it beside, whichever runtime drives it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from torch import Tensor

from ormo_rpc.loggers.dashboards import dashboards
from ormo_rpc.models.flat import sha256
from ormo_rpc.runtimes.job import JobLike
from ormo_rpc.runtimes.recorder import Position, Recorder
from ormo_rpc.server.events import Event, Kind
from ormo_rpc.server.parameter_server import ParameterServer, Status
from ormo_rpc.storage import checkpoint
from ormo_rpc.storage.journal import Journal, NoJournal, replay
from ormo_rpc.storage.run_directory import Progress, RunDirectory
from ormo_rpc.storage.summary import identity
from ormo_rpc.worker.evaluation import Evaluation

_log = logging.getLogger(__name__)


class Session:
    """The parameter server, trace, metrics, evaluations, checkpoints and the summary of one run.

    `observe` and `copy_state` are called under whatever lock guards the server; they hand copies over through queues. All other
    methods belong to one thread.

    Args:
        job: The run.
        run_dir: Its directory.
        executor: Where evaluations run.
        writer: Where checkpoints are written, one at a time.
        clock: The run's seconds, real or virtual.
        figures: Further running figures for the metrics.
        state: The state to keep in checkpoints, where it is more than that of the server.
        terminal: A file descriptor for the progress bar, where there is a terminal.

    Attributes:
        journal: To be told of every call that changes the server.
        seconds_before: The run's seconds when this process took over.
        progress: Counts that outlive this process.
        resumed_state: What a simulator had kept in the checkpoint that this run goes on from.
    """

    def __init__(
        self,
        job: JobLike,
        run_dir: Path,
        executor: Executor,
        writer: Executor,
        clock: Callable[[], float],
        *,
        figures: Callable[[], Mapping[str, float]] = dict,
        state: Callable[[], dict[str, Any]] | None = None,
        terminal: int | None = None,
    ) -> None:
        self.job = job
        self.directory = RunDirectory(run_dir)
        self.executor = executor
        self.writer = writer
        self.clock = clock
        self.figures = figures
        shown = dashboards(job.config, run_dir, job.total_tickets, terminal)
        self.recorder = Recorder(job, self.directory, shown, clock, figures)
        self.server = job.server(self.recorder.record, clock)
        self._state = state or (lambda: self.server.state_dict(replies=job.config.checkpoint.journal))
        self.checkpoint: Path | None = None
        self.journal: NoJournal = NoJournal()
        self.seconds_before = 0.0
        self.resumed_state: dict[str, Any] | None = None
        self._began = time.monotonic()
        self._export = job.exporter()
        self._evaluate = job.evaluator()
        self._evaluations: list[tuple[int, float, Future[Evaluation]]] = []
        self._to_evaluate: SimpleQueue[tuple[int, float, Tensor, dict[str, Tensor]]] = SimpleQueue()
        self.progress = Progress(run_dir)
        self._writing: Future[Path] | None = None
        """A checkpoint that is being written; where the disk is too slow, those that become due meanwhile are skipped."""
        self._copied = False
        """A state was copied, and waits for the events before it to be written."""
        self._seen = 0

    def open(self, life: int = 0) -> None:
        """Write the header of the trace, and go on from a checkpoint where there is one to go on from.

        Args:
            life: How often a server of this very run directory was started before. A later life goes on from the directory's
                newest good checkpoint and the journal, and cuts the trace back to them.

        Raises:
            ConfigError: the checkpoint is of another run, or damaged.
        """
        config, path = self.job.config, self.directory.path
        source = None if config.checkpoint.resume is None else checkpoint.find(Path(config.checkpoint.resume))
        own = checkpoint.newest(path) if life > 0 else None
        if own is not None or source is not None:
            self._load(own or source, in_place=own is not None)
        if life > 0:
            self._take_over(life, own)
        if self.directory.header_bytes() == 0:
            self.directory.write_header(
                algorithm=config.algorithm.name,
                scheduler=config.scheduler.name,
                num_workers=config.num_workers,
                seed=config.seed,
                resumed=None if source is None else str(source.absolute()),
                started=self.resumed_state is None,
                steps=self.server.algorithm.kernel.name,
            )
        if config.checkpoint.journal:
            self.journal = Journal(path)
        self._seen = self.server.iteration
        self.progress.begin(self._seen)
        if life > 0 and self.server.ended and self._evaluate is not None:  # the former life died before it could
            self._to_evaluate.put((self._seen, self.seconds_before, self.server.snapshot(), self.server.buffers.copy()))

    def _load(self, source: Path | None, *, in_place: bool) -> None:
        """Take over the state of a checkpoint, and what was recorded up to it where the records go on."""
        assert source is not None
        state = checkpoint.read(source, "server.pt")
        self.server.load_state_dict(state)
        records = state["session"]
        if self.job.config.runtime.name == "sim" and state["status"] == Status.running.value:
            self.resumed_state = state.get("cluster")
        if in_place or self.resumed_state is not None:
            self.recorder.statistics.load_state_dict(records["statistics"])
            self.seconds_before = records["seconds"]
        if in_place:
            self.checkpoint = source
            self.directory.cut(records["trace_bytes"], records["metrics_bytes"])

    def _take_over(self, life: int, own: Path | None) -> None:
        """Go on in the place of a server that has died."""
        path = self.directory.path
        if own is None:
            self.directory.cut(self.directory.header_bytes(), 0)
        replay(path, 0 if own is None else checkpoint.segment_of(own), self.server)
        self.server.resume_as(life)

    def observe(self, server: ParameterServer) -> None:
        """At the end of an epoch and when a checkpoint is due, copy what is needed for it."""
        if server.iteration == self._seen:
            return
        self._seen = server.iteration
        self.progress.write(self._seen)
        if self._evaluate is not None and (self._seen % self.job.batches_per_epoch == 0 or server.ended):
            self._to_evaluate.put((self._seen, self.clock(), server.snapshot(), server.buffers.copy()))
        every = self.job.config.checkpoint.every
        if every and self._seen % every == 0:
            self.copy_state()

    def copy_state(self) -> None:
        """Copy the state for a checkpoint, unless another one is under way."""
        if self._copied or self._writing is not None:
            return
        self._copied = True
        self._hand_over(self._state())

    def _hand_over(self, state: dict[str, Any]) -> None:
        """Have a state written as soon as the events that led to it are."""
        self.journal.rotate()
        seconds, segment = self.clock(), self.journal.segment

        def submit(position: Position) -> None:
            records = {
                "seconds": seconds,
                "trace_bytes": position.trace_bytes,
                "metrics_bytes": position.metrics_bytes,
                "statistics": position.statistics,
            }
            self._writing, self._copied = self.writer.submit(self._write, {**state, "session": records}, segment), False

        self.recorder.when_written(submit)

    def pump(self, *, now: bool = False) -> None:
        """Write down what has come since the last call; a row of metrics too if it is time for one, or ``now``.

        Raises:
            OSError: something cannot be written, such as a checkpoint to a full disk.
        """
        self.recorder.pump(now=now)
        for iteration, seconds, params, statistics in _drained(self._to_evaluate):
            assert self._evaluate is not None
            self._evaluations.append((iteration, seconds, self.executor.submit(self._evaluate, params, statistics)))
        self._take_evaluations(wait=False)
        if self._writing is not None and self._writing.done():
            self._take_checkpoint()

    def write_checkpoint(self, state: dict[str, Any]) -> None:
        """Write a state as a checkpoint, and wait until that is done.

        Raises:
            OSError: it cannot be written.
        """
        self.recorder.pump()
        if self._writing is not None:
            self._take_checkpoint()
        self._hand_over(state)
        self.recorder.pump()
        self._take_checkpoint()

    def _take_checkpoint(self) -> None:
        assert self._writing is not None
        writing, self._writing = self._writing, None
        self.checkpoint = writing.result()

    def _write(self, state: Mapping[str, Any], segment: int) -> Path:
        """In the writer: write a checkpoint, and remove what only older ones needed."""
        config, path = self.job.config, self.directory.path
        written = checkpoint.write(path, state, self._export(state), config, keep=config.checkpoint.keep, segment=segment)
        self.journal.forget(checkpoint.first_segment(path))
        self.recorder.record(Event(Kind.checkpoint, self.clock(), {"iteration": state["iteration"]}))
        return written

    def close(
        self, state: Mapping[str, Any], *, wait: bool, status: str | None = None, reason: str | None = None, **more: Any
    ) -> dict[str, Any]:
        """Write the rest and the summary.

        Args:
            state: The server's last state.
            wait: Whether to wait for evaluations that are not ready.
            status: How the run ended, where the server does not know it.
            reason: Why.
            more: Further entries of the summary.
        """
        self.pump()
        if wait:
            self._take_evaluations(wait=True)
        self.recorder.pump(now=True)
        self.journal.close()
        summary = self._summary(state) | {key: value for key, value in (("status", status), ("reason", reason)) if value} | more
        self.recorder.close(summary)
        return summary

    def _take_evaluations(self, *, wait: bool) -> None:
        while self._evaluations and (wait or self._evaluations[0][-1].done()):
            iteration, seconds, future = self._evaluations.pop(0)
            failure = future.exception()
            if failure is None:
                self.recorder.evaluated(iteration, seconds, future.result())
            else:  # training goes on, as it does not depend on it
                _log.error("evaluation at iteration %d failed", iteration, exc_info=failure)

    def _summary(self, state: Mapping[str, Any]) -> dict[str, Any]:
        statistics, evaluation = self.recorder.statistics, self.recorder.evaluation
        config, seconds = self.job.config, self.clock()
        applied = sum(statistics.delays.values())
        return {
            "status": state["status"],
            "reason": None,
            **identity(config),
            "parameters": state["params"].numel(),
            "iterations": state["iteration"],
            "gradients_computed": statistics.gradients_computed,
            "discarded": statistics.discarded,
            "rolled_back": self.progress.rolled_back,
            "server_lives": self.progress.lives,
            "repeated": statistics.repeated,
            "epochs": self.job.epoch(state["iteration"]),
            "train_loss": statistics.loss,
            "test_loss": None if evaluation is None else evaluation.loss,
            "test_accuracy": None if evaluation is None else evaluation.accuracy,
            "wall_seconds": time.monotonic() - self._began,
            "virtual_seconds": None,
            "updates_per_second": applied / seconds if seconds else 0.0,
            "delay_mean": statistics.delay_mean,
            "delay_max": statistics.delay_max,
            "delay_median": statistics.delay_quantile(0.5),
            "delay_99_percent": statistics.delay_quantile(0.99),
            "pushes_per_worker": {str(worker): count for worker, count in sorted(statistics.pushes_per_worker.items())},
            "lock_wait_seconds": 0.0,
            "lock_held_seconds": 0.0,
            "step_seconds": self.server.step_seconds,
            **self.figures(),
            "final_params_sha256": sha256(state["params"]),
            "final_buffers_sha256": sha256(*(state["buffers"][f"average.{name}"] for name in self.server.buffers.average)),
            "checkpoint": str(self.checkpoint) if self.checkpoint else None,
        }


def _drained(queue: SimpleQueue[Any]) -> list[Any]:
    items: list[Any] = []
    while True:
        try:
            items.append(queue.get_nowait())
        except Empty:
            return items
