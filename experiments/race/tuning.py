"""The choice of a learning rate, and of a variant, by the validation split."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from experiments.race.runs import Record
from experiments.race.setup import Setup

Try = Callable[[float, int, float], Record]
"""``run(rate, seed, limit)``: a run on the validation split, which may end after ``limit`` virtual seconds."""


@dataclass(frozen=True)
class Tried:
    """The results of the tuning seeds at one rate.

    Attributes:
        times: Virtual seconds to the tuning target of each seed that was run; None: it was not reached, or not in time to win.
        accuracy: The last accuracy of each seed.
        cut: It could not win any more, and was cut off.
    """

    times: list[float | None]
    accuracy: list[float]
    cut: bool

    @property
    def total(self) -> float:
        """The sum of the times; infinite where one was not reached."""
        return math.inf if self.cut or None in self.times else math.fsum(each for each in self.times if each is not None)

    @property
    def rank(self) -> tuple[float, float]:
        """The smaller the better: by time, and where no rate has one, by accuracy."""
        return self.total, -statistics.fmean(self.accuracy)


@dataclass
class Tuned:
    """The rates that were tried, and which is chosen."""

    tried: dict[float, Tried] = field(default_factory=dict[float, Tried])

    @property
    def best(self) -> float:
        """The chosen rate."""
        return min(self.tried, key=lambda rate: self.tried[rate].rank)

    @property
    def rank(self) -> tuple[float, float]:
        """That of the chosen rate."""
        return self.tried[self.best].rank


def tune(run: Try, setup: Setup, workers: int) -> Tuned:
    """Try every rate of the grid, and those beyond an edge where the best one is."""
    found = Tuned()
    for rate in setup.rates[workers]:
        found.tried[rate] = _try(run, setup, rate, found)
    for _ in range(setup.beyond):
        lowest, highest = min(found.tried), max(found.tried)
        if found.best not in (lowest, highest):
            break
        rate = lowest / 2 if found.best == lowest else highest * 2
        found.tried[rate] = _try(run, setup, rate, found)
    return found


def _try(run: Try, setup: Setup, rate: float, so_far: Tuned) -> Tried:
    """Run a rate with each tuning seed, as long as it can be the best."""
    best = so_far.rank[0] if so_far.tried else math.inf
    times, accuracy, spent = list[float | None](), list[float](), 0.0
    for seed in setup.tuning_seeds:
        found = run(rate, seed, best - spent)
        time = found.time_to(setup.tuning_target, setup.smooth)
        times.append(time)
        accuracy.append(found.last(setup.smooth))
        spent += math.inf if time is None else time
        if spent >= best and best < math.inf:
            return Tried(times, accuracy, cut=True)
    return Tried(times, accuracy, cut=False)


def best_variant(tuned: Mapping[str, Tuned]) -> str:
    """The variant with the best rate of all."""
    return min(tuned, key=lambda name: tuned[name].rank)


def described(tuned: Tuned) -> dict[str, Sequence[float | None] | str]:
    """The tuning for the results: times to the target by rate, ``cut`` for a rate that could not win any more."""
    return {f"{rate:g}": "cut" if tried.cut else tried.times for rate, tried in sorted(tuned.tried.items())}
