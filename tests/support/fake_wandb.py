"""A stand-in for the module wandb, which takes notes only."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any


class FakeRun:
    """A run of wandb."""

    disabled = False

    def __init__(self, run_id: str, *, offline: bool) -> None:
        self.id = run_id
        self.offline = offline
        self.logged: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.metrics: list[tuple[str, str, str | None]] = []
        self.finished = 0

    def define_metric(self, name: str, *, step_metric: str, summary: str | None = None) -> None:
        """Note a metric, its x axis, and what the summary has of it."""
        self.metrics.append((name, step_metric, summary))

    def log(self, row: dict[str, Any]) -> None:
        """Note a row, which must be of plain values."""
        json.dumps({key: value for key, value in row.items() if key != "delay/histogram"})
        self.logged.append(row)

    def finish(self) -> None:
        """Note the end."""
        self.finished += 1


class Histogram:
    """Counts and the edges of their bins, given as to ``wandb.Histogram``."""

    MAX_LENGTH = 4

    def __init__(self, np_histogram: tuple[Any, Any]) -> None:
        self.counts, self.edges = (array.tolist() for array in np_histogram)


class FakeError(Exception):
    """Stands for wandb's own."""


class FakeCommError(FakeError):
    """Stands for that of a server that does not answer."""


class FakeAuthenticationError(FakeCommError):
    """Stands for that of a wrong key."""


class FakeWandb(SimpleNamespace):
    """The module.

    Args:
        failures: What the next calls of ``init`` raise.

    Attributes:
        arguments: Those of the newest call of ``init``.
        runs: The runs that were started.
    """

    Histogram = Histogram
    Error = FakeError
    errors = SimpleNamespace(CommError=FakeCommError, AuthenticationError=FakeAuthenticationError)

    def __init__(self, *failures: Exception) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}
        self.failures = list(failures)
        self.runs: list[FakeRun] = []

    def Settings(self, **settings: Any) -> dict[str, Any]:  # noqa: N802 - its name there
        """Return the settings."""
        return settings

    def init(self, **arguments: Any) -> FakeRun:
        """Start a run, or fail to."""
        self.arguments = arguments
        if self.failures:
            raise self.failures.pop(0)
        self.runs.append(FakeRun(arguments["id"] or f"new{len(self.runs)}", offline=arguments["mode"] == "offline"))
        return self.runs[-1]
