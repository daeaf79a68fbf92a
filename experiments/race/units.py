"""Units of the race: one contender in one cell, tuned and run with the reported seeds."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from experiments.race.contenders import CONTENDERS, FIRST, Variant, record
from experiments.race.runs import Missing, Record, Store
from experiments.race.setup import Setup
from experiments.race.tuning import best_variant, described, tune

MOST_SEEDS = 20
"""Reported seeds, at most."""


@dataclass(frozen=True)
class Unit:
    """One contender in one cell."""

    setting: str
    workers: int
    contender: str

    @override
    def __str__(self) -> str:
        return f"{self.setting}, K = {self.workers}, {self.contender}"


def units(cells: Iterable[tuple[str, int]], contenders: Iterable[str]) -> Iterator[Unit]:
    """The units of cells, in their order: first the contenders that goals and picture need."""
    cells, asked = [*cells], set(contenders)
    for names in (FIRST, [name for name in CONTENDERS if name not in FIRST]):
        for setting, workers in cells:
            yield from (Unit(setting, workers, name) for name in names if name in asked)


def outcome(unit: Unit, setup: Setup, store: Store) -> dict[str, Any]:
    """Tune a contender, run it with the reported seeds, and return its entry in the results.

    Args:
        unit: The contender and its cell.
        setup: The job.
        store: Has the runs, and makes those that are missing.

    Raises:
        Missing: a run is missing that must not be made now.
    """

    def run(variant: Variant, rate: float, seed: int, split: str, limit: float = math.inf) -> Record:
        return record(
            variant,
            setup,
            store,
            setting=unit.setting,
            workers=unit.workers,
            rate=rate,
            seed=seed,
            split=split,
            limit=limit,
        )

    variants = {variant.name: variant for variant in CONTENDERS[unit.contender].variants(unit.workers)}
    tuned = {
        name: tune(
            lambda rate, seed, limit, variant=variant: run(variant, rate, seed, "validation", limit), setup, unit.workers
        )
        for name, variant in variants.items()
    }
    chosen = best_variant(tuned)
    rate = tuned[chosen].best
    return {
        "setting": unit.setting,
        "workers": unit.workers,
        "contender": unit.contender,
        "variant": chosen,
        "rate": rate,
        "tuning": {name: described(each) for name, each in tuned.items()},
        "validation_accuracy": -tuned[chosen].rank[1],
        "validation_time": None if math.isinf(tuned[chosen].rank[0]) else tuned[chosen].rank[0] / len(setup.tuning_seeds),
        "runs": [shortened(seed, run(variants[chosen], rate, seed, "test")) for seed in setup.seeds],
    }


def collected(chosen: Iterable[Unit], setup: Setup, store: Store) -> tuple[list[dict[str, Any]], list[Unit]]:
    """The entries of the units all of whose runs are in the store, with as many seeds as it has, and the other units."""
    rows, missing = list[dict[str, Any]](), list[Unit]()
    for unit in chosen:
        row = None
        with contextlib.suppress(Missing):
            for count in range(len(setup.seeds), MOST_SEEDS + 1):
                row = outcome(unit, dataclasses.replace(setup, seeds=tuple(range(count))), store)
        if row is None:
            missing.append(unit)
        else:
            rows.append(row)
    return rows, missing


def content(chosen: Iterable[Unit], setup: Setup, store: Store) -> dict[str, Any]:
    """The content of the results: the job, the units that are finished, and which are not."""
    rows, missing = collected(chosen, setup, store)
    return {
        "epochs": setup.epochs,
        "batch_size": setup.batch_size,
        "targets": setup.targets,
        "target": setup.target,
        "tuning_target": setup.tuning_target,
        "smooth": setup.smooth,
        "tuning_seeds": setup.tuning_seeds,
        "rates": {workers: sorted(rates) for workers, rates in setup.rates.items()},
        "beyond": setup.beyond,
        "every": setup.every,
        "job": setup.job,
        "machines": sorted(store.machines - {""}),
        "not_run": [[unit.setting, unit.workers, unit.contender] for unit in missing],
        "rows": rows,
    }


def shortened(seed: int, found: Record) -> dict[str, Any]:
    """A run for the results: seconds to a hundredth, accuracies in ten-thousandths."""
    return {
        "seed": seed,
        "status": found.status,
        "gradients": found.iterations[-1] if found.iterations else 0,
        "seconds": [round(each, 2) for each in found.seconds],
        "accuracy": [round(each * 10_000) for each in found.accuracy],
    }


def planned_runs(unit: Unit, setup: Setup) -> set[tuple[object, ...]]:
    """The runs of a unit, as if no rate beyond the grid were tried; those that units have in common are equal."""
    found: set[tuple[object, ...]] = set()
    variants = CONTENDERS[unit.contender].variants(unit.workers)
    for variant in variants:
        setting = unit.setting if variant.clock is None else ""
        run = (setting, unit.workers, variant.overrides, variant.members)
        found |= {(*run, rate, seed) for rate in setup.rates[unit.workers] for seed in setup.tuning_seeds}
    # The rate and the variant that are chosen may be the same in every setting, or not.
    found |= {(unit.setting, unit.workers, variants[0].overrides, variants[0].members, "test", seed) for seed in setup.seeds}
    return found
