"""The interface of a logger: a `Logger` is chosen in the configuration, and starts a `RunLog` for the run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ormo_rpc.loggers.statistics import Statistics
from ormo_rpc.options import Part, at_least_one, option, positive


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """The run to be logged.

    Attributes:
        name: Algorithm, scheduler, workers and seed, such as ``ormo-async-4w-seed0``.
        config: The whole configuration, nested, of plain values.
        directory: The run directory; a logger may write into it.
        total_iterations: T, the iterations of the run.
    """

    name: str
    config: Mapping[str, Any]
    directory: Path
    total_iterations: int


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

    def iterations_between_rows(self, total_iterations: int) -> int:
        """The number of iterations after which a row is due; so few by default that the shortest run has a curve."""
        return self.log_iterations or max(1, total_iterations // 100)

    @abstractmethod
    def start(self, run: RunInfo) -> RunLog:
        """Begin to log a run.

        Raises:
            ValueError: it cannot; the message has the key to change.
        """
