"""The sections about evaluations and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from ormo_rpc.options import Section, at_least_one, not_negative, option


def _are_targets(values: Sequence[float]) -> bool:
    return all(map(math.isfinite, values)) and len(set(values)) == len(values)


class When(Enum):
    """The times at which snapshots of a live run are evaluated."""

    during = "during"
    """Beside training, in the server's process."""
    after = "after"
    """After the last update; until then they are on disk."""


@dataclass(frozen=True, kw_only=True)
class Evaluate(Section):
    """The times of evaluations, and what follows from them."""

    PATH = "evaluate"
    every: int | None = option(
        None, "iterations between evaluations; by default each epoch's end", valid=at_least_one, expected="a whole number >= 1"
    )
    when: When = option(
        When.during,
        "during: live runs evaluate beside training, which takes processor time from workers on the same cores; after: they "
        "write snapshots (4 bytes per parameter each), and evaluate these after the last update",
    )
    targets: list[float] = option(
        [],
        "values of the task's main metric, such as [0.85, 0.88]; the summary has the seconds and gradients to each of them",
        valid=_are_targets,
        expected="finite numbers, each once",
    )
    smooth: int = option(1, "evaluations whose mean has to reach a target", valid=at_least_one, expected="a whole number >= 1")
    ema: float | None = option(
        None,
        "evaluate a moving average of the parameters with this decay, such as 0.999, instead of the parameters themselves",
        valid=lambda v: 0 < v < 1,
        expected="a number in (0, 1), or null",
    )
    patience: int | None = option(
        None,
        "stop early after this many evaluations in a row without a better one (see optimized_metric); implies checkpoint.best",
        valid=at_least_one,
        expected="a whole number >= 1, or null",
    )
    min_delta: float = option(
        0.0,
        "what an evaluation must be better by to count as better, for patience",
        valid=not_negative,
        expected="a finite number >= 0",
    )


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Section):
    """The times of checkpoints, and the one to resume from."""

    PATH = "checkpoint"
    every: int = option(
        0, "iterations between checkpoints; 0: by time alone", valid=not_negative, expected="a whole number >= 0"
    )
    every_seconds: float = option(
        30.0,
        "seconds (of the machine, not of a simulation) between checkpoints; 0: not by time",
        valid=not_negative,
        expected="a finite number >= 0",
    )
    journal: bool = option(False, "make each gradient durable before it is acknowledged: a crash then rolls nothing back")
    keep: int = option(3, "checkpoints that are kept", valid=at_least_one, expected="a whole number >= 1")
    best: bool = option(False, "keep the model of the best evaluation as well (see optimized_metric), in checkpoints/best")
    resume: str | None = option(None, "a checkpoint or run directory to resume from", path=True)
