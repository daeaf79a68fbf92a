"""Settings of the race, and the targets and sizes that all of its contenders share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SETTINGS: Mapping[str, str] = {
    "one_slow": "one worker 10 times slower",
    "exponential": "random times",
    "none": "all workers alike",
    "half_slow": "half of the workers 3 times slower",
    "gamma": "random times, less spread",
}
"""The distributions of speeds, with their titles in pictures."""

CELLS: Sequence[tuple[str, int]] = (
    *((setting, workers) for setting in ("one_slow", "exponential", "none", "half_slow") for workers in (4, 16)),
    ("exponential", 64),
    *(("gamma", workers) for workers in (4, 16)),
    *((setting, 64) for setting in ("one_slow", "none", "half_slow", "gamma")),
)
"""Setting and number of workers, in the order in which they are run."""


DEFAULT_MOMENTUM = 0.9
"""``train.momentum`` where nothing sets it."""


def _rates() -> dict[int, tuple[float, ...]]:
    return {
        workers: tuple(lowest * 2**power for power in (2, 1, 3, 0, 4))
        for workers, lowest in ((4, 0.02), (16, 0.04), (64, 0.08))
    }


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The job, its evaluations, and the choice of a rate.

    Attributes:
        job: Overrides of the data set, the model and the held-out samples.
        where: Overrides of the device and the precision of passes. Rows that were made with other ones count.
        momenta: Momentum coefficients; where there are several, each makes a variant of its own of every variant.
        epochs: Length of a run.
        batch_size: Samples of a gradient.
        every: Gradients between evaluations, about: whole rounds of the synchronous rules.
        smooth: Evaluations in a row whose mean must reach a target.
        targets: Test accuracies whose times are reported.
        target: Test accuracy by whose time contenders are compared.
        tuning_target: Validation accuracy by whose time a rate is chosen; validation is somewhat easier than test.
        rates: The grid for each number of workers, in the order in which it is tried; each is twice the next lower one.
        beyond: Rates that are tried beyond an edge of the grid, at most.
        tuning_seeds: Seeds of the runs by which a rate is chosen.
        seeds: Seeds of the runs that are reported.
    """

    job: tuple[str, ...] = ("dataset=fashion_mnist", "model=mlp", "dataset.validation=0.1")
    where: tuple[str, ...] = ()
    momenta: tuple[float, ...] = (DEFAULT_MOMENTUM,)
    epochs: int = 8
    batch_size: int = 64
    every: int = 100
    smooth: int = 3
    targets: tuple[float, ...] = (0.85, 0.87, 0.88)
    target: float = 0.87
    tuning_target: float = 0.875
    rates: Mapping[int, tuple[float, ...]] = field(default_factory=_rates)
    beyond: int = 3
    tuning_seeds: tuple[int, ...] = (1000, 1001)
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Race:
    """A job with its cells, and its results.

    Attributes:
        name: Of the files of the results.
        option: Of the command line that asks for it.
        setup: The job.
        cells: Setting and number of workers, in the order in which they are run.
        goals: The page has the goals.
        rates: The page has the rates to begin with.
    """

    name: str
    option: str = ""
    setup: Setup
    cells: Sequence[tuple[str, int]]
    goals: bool = True
    rates: bool = True


RACE = Race(name="race", setup=Setup(), cells=CELLS)
LONG = Race(
    name="race_long",
    option="--long",
    setup=Setup(epochs=16, targets=(0.85, 0.86, 0.87), target=0.86, tuning_target=0.865),
    cells=(("exponential", 64),),
    goals=False,
)
"""Twice as long: with 64 workers 8 epochs are 106 rounds, in which nothing asynchronous reaches 86%."""
TUNED_MOMENTUM = Race(
    name="race_momentum",
    option="--momentum",
    setup=Setup(momenta=(DEFAULT_MOMENTUM, 0.95, 0.975)),
    cells=tuple(cell for cell in CELLS if cell[1] in (4, 16)),
    rates=False,  # one that was chosen with another momentum is no advice
)
"""``train.momentum`` of every contender tuned as well."""
