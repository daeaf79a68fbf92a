"""The interface of a logger: a `Logger` is chosen in the configuration, and starts a `RunLog` for the run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ormo_rpc.loggers.statistics import Statistics
from ormo_rpc.options import Part, at_least_one, not_negative, option, positive
from ormo_rpc.tasks.metrics import TaskMetric, metric_named

_SAID_BY_NAME = ("algorithm", "scheduler", "workers", "seed")
_NO_SETTING = ("logger", "checkpoint", "server", "hydra")
"""Sections that say how and where a run is made, and not which one."""


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """The run to be logged.

    Attributes:
        name: Algorithm, scheduler, workers and seed, such as ``ormo-async-4w-seed0``.
        config: The whole configuration, nested, of plain values.
        directory: The run directory; a logger may write into it.
        total_iterations: T, the iterations of the run.
        overrides: What was typed to start the run, such as ``train.lr=0.1``.
        sweep: The name of the sweep that the run belongs to.
        continues: The run directory that ``checkpoint.resume`` names.
        rows: Those of metrics.jsonl so far, where an earlier server process of this run has died.
        metric: Declares a metric of its evaluations (without ``test_`` or ``val_``).
    """

    name: str
    config: Mapping[str, Any]
    directory: Path
    total_iterations: int
    overrides: Sequence[str] = ()
    sweep: str | None = None
    continues: Path | None = None
    rows: Sequence[Mapping[str, Any]] = ()
    metric: Callable[[str], TaskMetric] = metric_named

    @property
    def title(self) -> str:
        """The name, and the overrides that it does not say already: what the runs of a sweep differ in."""
        keys = [override.lstrip("+~").partition("=")[0] for override in self.overrides]
        said = [key in _SAID_BY_NAME or key.partition(".")[0] in _NO_SETTING for key in keys]
        return " ".join([self.name, *(override for override, out in zip(self.overrides, said, strict=True) if not out)])


class RunLog:
    """The log of one run; a subclass overrides what it needs. All calls come from one thread."""

    def log(self, row: Mapping[str, Any], statistics: Statistics) -> None:
        """Log one row of metrics.jsonl.

        Args:
            row: ``iteration``, ``epoch``, ``seconds``, and metrics by name: those of an interval or of an evaluation.
            statistics: Of all events so far; do not keep the object, which is updated in place.
        """

    def finish(self, summary: Mapping[str, Any]) -> None:
        """End the log; the content of summary.json is final."""


@dataclass(frozen=True, kw_only=True)
class Logger(Part, ABC):
    """A destination for metrics besides the run directory; the fields here are options of every logger."""

    PATH = "logger"
    progress: bool = option(True, "progress bar, when standard error is a terminal")
    log_seconds: float = option(0.5, "seconds between rows of metrics.jsonl", valid=positive, expected="a finite number > 0")
    log_iterations: int | None = option(
        None,
        "iterations between such rows, whichever comes first; a hundredth of the run by default",
        valid=at_least_one,
        expected="a whole number >= 1",
    )

    elastic_iterations: int = option(
        61,
        "iterations between measurements of elastic consistency (elastic_mean, elastic_max); 0: none",
        valid=not_negative,
        expected="a whole number >= 0",
    )

    def iterations_between_rows(self, total_iterations: int) -> int:
        """The number of iterations after which a row is due; so few by default that the shortest run has a curve."""
        return self.log_iterations or max(1, total_iterations // 100)

    def prepare(self) -> None:
        """Check, in the launcher and before anything starts, that a run can be logged.

        Raises:
            ValueError: it cannot; the message has the key to change.
        """

    @abstractmethod
    def start(self, run: RunInfo) -> RunLog:
        """Begin to log a run.

        Raises:
            ValueError: it cannot; the message has the key to change.
        """
