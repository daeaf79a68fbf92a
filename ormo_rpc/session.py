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

from ormo_rpc import checkpoint
from ormo_rpc.config import Config
from ormo_rpc.dashboards import dashboards
from ormo_rpc.evaluation import Evaluation
from ormo_rpc.flat import sha256
from ormo_rpc.job import JobLike
from ormo_rpc.recorder import Recorder
from ormo_rpc.records import Event, Kind
from ormo_rpc.run_directory import RunDirectory
from ormo_rpc.runtime_options import GradientKind, SimRuntime
from ormo_rpc.server import ParameterServer

_log = logging.getLogger(__name__)


class Session:
    """The parameter server, trace, metrics, evaluations, checkpoints and the summary of one run.

    `observe` is called right after each change of the server, under whatever lock guards it; it hands copies over through
    queues. All other methods belong to one thread.

    Args:
        job: The run.
        run_dir: Its directory.
        executor: Where evaluations run.
        clock: The run's seconds, real or virtual.
        figures: Further running figures for the metrics.
        terminal: A file descriptor for the progress bar, where there is a terminal.
    """

    def __init__(
        self,
        job: JobLike,
        run_dir: Path,
        executor: Executor,
        clock: Callable[[], float],
        *,
        figures: Callable[[], Mapping[str, float]] = dict,
        terminal: int | None = None,
    ) -> None:
        self.job = job
        self.directory = RunDirectory(run_dir)
        self.executor = executor
        self.clock = clock
        self.figures = figures
        shown = dashboards(job.config, run_dir, job.total_tickets, terminal)
        self.recorder = Recorder(job, self.directory, shown, clock, figures)
        self.server = job.server(self.recorder.record, clock)
        self.checkpoint: Path | None = None
        self._began = time.monotonic()
        self._export = job.exporter()
        self._evaluate = job.evaluator()
        self._evaluations: list[tuple[int, float, Future[Evaluation]]] = []
        self._to_evaluate: SimpleQueue[tuple[int, float, Tensor, dict[str, Tensor]]] = SimpleQueue()
        self._to_write: dict[str, Any] | None = None
        """A state that waits to be written; where the disk is too slow for ``checkpoint.every``, later ones are skipped."""
        self._seen = 0

    def open(self) -> None:
        """Write the header of the trace, and go on from a checkpoint where the configuration names one.

        Raises:
            ValueError: the checkpoint is of another run, or damaged.
        """
        config = self.job.config
        resumed = None if config.checkpoint.resume is None else checkpoint.find(Path(config.checkpoint.resume))
        if resumed is not None:
            self.server.load_state_dict(checkpoint.read(resumed, "server.pt"))
            self._seen = self.server.iteration
        self.directory.write_header(
            algorithm=config.algorithm.name,
            scheduler=config.scheduler.name,
            num_workers=config.num_workers,
            seed=config.seed,
            resumed=None if resumed is None else str(resumed.absolute()),
        )

    def observe(self, server: ParameterServer) -> None:
        """At the end of an epoch and when a checkpoint is due, copy what is needed for it."""
        if server.iteration == self._seen:
            return
        self._seen = server.iteration
        if self._evaluate is not None and (self._seen % self.job.batches_per_epoch == 0 or server.ended):
            self._to_evaluate.put((self._seen, self.clock(), server.snapshot(), server.buffers.copy()))
        every = self.job.config.checkpoint.every
        if every and self._seen % every == 0 and self._to_write is None:
            self._to_write = server.state_dict()

    def pump(self, *, now: bool = False) -> None:
        """Write down what has come since the last call; a row of metrics too if it is time for one, or ``now``."""
        self.recorder.pump(now=now)
        for iteration, seconds, params, statistics in _drained(self._to_evaluate):
            assert self._evaluate is not None
            self._evaluations.append((iteration, seconds, self.executor.submit(self._evaluate, params, statistics)))
        self._take_evaluations(wait=False)
        if self._to_write is not None:
            self.write_checkpoint(self._to_write)
            self._to_write = None

    def write_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Write a state of the server as a checkpoint.

        Raises:
            OSError: it cannot be written.
        """
        config = self.job.config
        model = self._export(state)
        self.checkpoint = checkpoint.write(self.directory.path, state, model, config, keep=config.checkpoint.keep)
        self.recorder.record(Event(Kind.checkpoint, self.clock(), {"iteration": state["iteration"]}))

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
            **_identity(config),
            "parameters": state["params"].numel(),
            "iterations": state["iteration"],
            "gradients_computed": statistics.gradients_computed,
            "discarded": statistics.discarded,
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
            **self.figures(),
            "final_params_sha256": sha256(state["params"]),
            "final_buffers_sha256": sha256(*(state["buffers"][f"average.{name}"] for name in self.server.buffers.average)),
            "checkpoint": str(self.checkpoint) if self.checkpoint else None,
        }


SUMMARY_KEYS = (
    *(
        "status",
        "reason",
        "algorithm",
        "scheduler",
        "runtime",
        "dataset",
        "model",
        "heterogeneity",
        "lr",
        "seed",
        "num_workers",
    ),
    *("parameters", "iterations", "gradients_computed", "discarded", "repeated", "epochs", "train_loss", "test_loss"),
    *("test_accuracy", "wall_seconds", "virtual_seconds", "updates_per_second", "delay_mean", "delay_max"),
    *(
        "pushes_per_worker",
        "lock_wait_seconds",
        "lock_held_seconds",
        "final_params_sha256",
        "final_buffers_sha256",
        "checkpoint",
    ),
)
"""What every summary has at least."""


def unfinished_summary(config: Config, status: str, reason: str) -> dict[str, Any]:
    """The summary of a run whose server could not write one: what the configuration tells, and None for the rest."""
    return {**dict.fromkeys(SUMMARY_KEYS), **_identity(config), "status": status, "reason": reason}


def _identity(config: Config) -> dict[str, Any]:
    """What kind of run it is."""
    synthetic = isinstance(config.runtime, SimRuntime) and config.runtime.gradient is not GradientKind.real
    return {
        "algorithm": config.algorithm.name,
        "scheduler": config.scheduler.name,
        "runtime": config.runtime.name,
        "dataset": "-" if synthetic else config.dataset.name,
        "model": config.sim.gradient.value if synthetic else config.model.name,
        "heterogeneity": config.heterogeneity.name,
        "lr": config.train.lr,
        "seed": config.seed,
        "num_workers": config.num_workers,
    }


def _drained(queue: SimpleQueue[Any]) -> list[Any]:
    items: list[Any] = []
    while True:
        try:
            items.append(queue.get_nowait())
        except Empty:
            return items
