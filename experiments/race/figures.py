"""Figures of the results: times to targets, medians over seeds, ratios between contenders."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.race import runs
from experiments.race.contenders import ASYNCHRONOUS, CONTENDERS

Row = Mapping[str, Any]
"""A contender in a cell, as the results have it."""
M_SYNC = ("ddp", "m_sync", "m_sync_cancel")
"""m-synchronous SGD with heavy ball, with or without cancelling; with m = K it is DDP."""
M_SYNC_NESTEROV = ("ddp_nesterov", "m_sync_nesterov")
"""The same with Nesterov momentum."""


@dataclass(frozen=True)
class Results:
    """The content of ``results/race.json``."""

    content: Mapping[str, Any]

    @property
    def rows(self) -> Sequence[Row]:
        """All contenders in all cells."""
        return self.content["rows"]

    @property
    def smooth(self) -> int:
        """Evaluations in a row whose mean must reach a target."""
        return self.content["smooth"]

    @property
    def target(self) -> float:
        """The target by whose time contenders are compared."""
        return self.content["target"]

    def cell(self, setting: str, workers: int) -> dict[str, Row]:
        """The contenders of a cell by name."""
        return {row["contender"]: row for row in self.rows if (row["setting"], row["workers"]) == (setting, workers)}

    def times(self, row: Row, target: float) -> dict[int, float]:
        """The time to a target by seed; infinite where it was not reached, or the run diverged."""
        return {run["seed"]: time_to(run, target, self.smooth) for run in row["runs"]}

    def time(self, row: Row, target: float) -> float:
        """The median time to a target; infinite where most seeds did not reach it."""
        return median(self.times(row, target).values())

    def last(self, row: Row) -> list[float]:
        """The last accuracy of each seed that did not diverge, the mean of the last evaluations."""
        runs = [run for run in row["runs"] if run["accuracy"] and run["status"] == "completed"]
        return [statistics.fmean(run["accuracy"][-self.smooth :]) / 10_000 for run in runs]

    def diverged(self, row: Row) -> int:
        """The number of seeds that diverged."""
        return sum(run["status"] != "completed" for run in row["runs"])

    def last_of_shared(self, row: Row | None, other: Row | None) -> tuple[list[float], list[float]]:
        """The last accuracies of two contenders with the seeds that both have."""
        mine, others = (
            {run["seed"]: self.last({"runs": [run]}) for run in (() if each is None else each["runs"])} for each in (row, other)
        )
        seeds = [seed for seed in sorted(mine.keys() & others.keys()) if mine[seed] and others[seed]]
        return [mine[seed][0] for seed in seeds], [others[seed][0] for seed in seeds]

    def shared(self, row: Row | None, other: Row | None) -> int:
        """The number of seeds that both have."""
        return len(self._pairs(row, other, self.target))

    def medians(self, row: Row | None, other: Row | None, target: float) -> tuple[float, float]:
        """The median times of two contenders to a target, over the seeds that both have; NaN where there is none."""
        pairs = self._pairs(row, other, target)
        return median(mine for mine, _ in pairs), median(others for _, others in pairs)

    def ratio(self, row: Row | None, other: Row | None, target: float) -> float:
        """A contender's median time over another one's (`medians`); NaN where neither reached it, or one is missing."""
        mine, others = self.medians(row, other, target)
        return math.nan if math.isinf(mine) and math.isinf(others) else mine / others

    def ratios(self, row: Row | None, other: Row | None, target: float) -> list[float]:
        """The ratio for each seed that both have: the same initial parameters, and the same batches in the same order."""
        return [mine / others for mine, others in self._pairs(row, other, target)]

    def _pairs(self, row: Row | None, other: Row | None, target: float) -> list[tuple[float, float]]:
        if row is None or other is None:
            return []
        mine, others = self.times(row, target), self.times(other, target)
        return [(mine[seed], others[seed]) for seed in sorted(mine.keys() & others.keys())]


def time_to(run: Mapping[str, Any], target: float, smooth: int) -> float:
    """The time at which a run of the results, whose accuracies are in ten-thousandths, reaches a target; infinite: never.

    One that diverged does not count as having reached it.
    """
    if run["status"] != "completed":
        return math.inf
    found = runs.time_to(run["seconds"], run["accuracy"], target * 10_000, smooth)
    return math.inf if found is None else found


def median(values: Iterable[float]) -> float:
    """The median; not a number where there is no value."""
    found = [*values]
    return statistics.median(found) if found else math.nan


def best_of(cell: Mapping[str, Row], names: Iterable[str]) -> Row | None:
    """The contender that validation puts first: by the time to the tuning target, and where none has one, by the accuracy.

    Of those with the same time it is the first: runs of a rate that is tried later end as soon as they are too slow to be
    chosen, so accuracies of contenders that reach the target are not comparable.
    """
    return min((cell[name] for name in names if name in cell), key=_rank, default=None)


def _rank(row: Row) -> tuple[float, float]:
    time = row["validation_time"]
    return (math.inf, -(row["validation_accuracy"] or 0.0)) if time is None else (time, 0.0)


def best_asynchronous(cell: Mapping[str, Row]) -> Row | None:
    """The best asynchronous rule of a cell."""
    return best_of(cell, ASYNCHRONOUS)


def best_synchronous(cell: Mapping[str, Row]) -> Row | None:
    """The best synchronous rule of a cell."""
    return best_of(cell, [name for name in CONTENDERS if name not in ASYNCHRONOUS])


def best_m_sync(cell: Mapping[str, Row]) -> Row | None:
    """The best of `M_SYNC` in a cell."""
    return best_of(cell, M_SYNC)


def best_m_sync_nesterov(cell: Mapping[str, Row]) -> Row | None:
    """The best of `M_SYNC_NESTEROV` in a cell."""
    return best_of(cell, M_SYNC_NESTEROV)


def rates_tried(row: Row) -> int:
    """The number of rates that were tried, over all variants."""
    return sum(map(len, row["tuning"].values()))
