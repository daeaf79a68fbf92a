"""Units of the race: one contender in one cell, tuned and run with the reported seeds."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from experiments.race.contenders import CONTENDERS, FIRST, Unit, Variant, record, variants_of
from experiments.race.earlier import job_of, version
from experiments.race.figures import Row
from experiments.race.runs import Missing, Record, Store
from experiments.race.setup import Setup
from experiments.race.tuning import best_variant, described, tune

MOST_SEEDS = 20
"""Reported seeds, at most."""


def units(cells: Iterable[tuple[str, int]], contenders: Iterable[str]) -> Iterator[Unit]:
    """The units of cells, in their order: first the contenders that goals and picture need."""
    cells, asked = [*cells], set(contenders)
    for names in (FIRST, [name for name in CONTENDERS if name not in FIRST]):
        for setting, workers in cells:
            yield from (Unit(setting, workers, name) for name in names if name in asked)


Runner = Callable[[Variant, float, int, str, float], Record]
"""``run(variant, rate, seed, split, limit)``, see `record`."""
CHOICE = ("variant", "rate", "tuning", "validation_accuracy", "validation_time")
"""The keys of a row that tell of the tuning."""


def outcome(unit: Unit, setup: Setup, store: Store, earlier: Row | None = None, model: Row | None = None) -> dict[str, Any]:
    """Tune a contender, run it with the reported seeds, and return its row of the results.

    Args:
        unit: The contender and its cell.
        setup: The job.
        store: Has the runs, and makes those that are missing.
        earlier: A row of `earlier_rows`: its choice stands, and its seeds are not run again.
        model: The row of the contender that this one is tuned as, where there is one.

    Raises:
        Missing: a run is missing that must not be made now.
    """

    def run(variant: Variant, rate: float, seed: int, split: str, limit: float = math.inf) -> Record:
        found = record(
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
        machines.add(found.machine)
        return found

    if earlier is None and model is not None and model["version"] == version(unit, setup):
        earlier = {**model, **dataclasses.asdict(unit)}  # speeds do not last, so the times are the same too
    machines = set[str](() if earlier is None else earlier["machines"])
    variants = {each.name: each for each in variants_of(unit.contender, unit.workers, setup.momenta)}
    tuning = setup
    if model is not None:
        variants = {model["variant"]: variants[model["variant"]]}
        tuning = dataclasses.replace(setup, rates={unit.workers: (model["rate"],)}, beyond=0)
    choice = _choice(variants, tuning, unit.workers, run) if earlier is None else {key: earlier[key] for key in CHOICE}
    seeds: dict[int, Any] = {} if earlier is None else {each["seed"]: each for each in earlier["runs"]}
    for seed in setup.seeds:
        if seed not in seeds:
            seeds[seed] = shortened(seed, run(variants[choice["variant"]], choice["rate"], seed, "test"))
    return {
        **dataclasses.asdict(unit),
        **choice,
        "version": version(unit, setup),
        "machines": sorted(machines - {""}),
        "runs": [seeds[seed] for seed in sorted(seeds)],
    }


def _choice(variants: Mapping[str, Variant], setup: Setup, workers: int, run: Runner) -> dict[str, Any]:
    """Tune each variant: the best one, its rate, and what was tried."""
    tuned = {
        name: tune(lambda rate, seed, limit, variant=variant: run(variant, rate, seed, "validation", limit), setup, workers)
        for name, variant in variants.items()
    }
    name = best_variant(tuned)
    time, accuracy = tuned[name].rank
    return {
        "variant": name,
        "rate": tuned[name].best,
        "tuning": {each: described(found) for each, found in tuned.items()},
        "validation_accuracy": -accuracy,
        "validation_time": None if math.isinf(time) else time / len(setup.tuning_seeds),
    }


def model_of(unit: Unit, earlier: Mapping[Unit, Row]) -> Row | None:
    """The earlier row of the contender that a contender is tuned as."""
    return earlier.get(dataclasses.replace(unit, contender=CONTENDERS[unit.contender].tuned_as))


def collected(chosen: Iterable[Unit], setup: Setup, store: Store, earlier: Mapping[Unit, Row]) -> dict[Unit, Row]:
    """The rows of the units that have one, each with as many seeds as there are.

    Args:
        chosen: The units.
        setup: The job; a row that is new has its seeds.
        store: Has runs, and makes none.
        earlier: Rows of `earlier_rows`.
    """
    found = dict[Unit, Row]()
    for unit in chosen:
        row = earlier.get(unit)
        with contextlib.suppress(Missing):
            for count in range(len(setup.seeds) if row is None else 1, MOST_SEEDS + 1):
                row = outcome(unit, dataclasses.replace(setup, seeds=tuple(range(count))), store, row, model_of(unit, earlier))
        if row is not None:
            found[unit] = row
    return found


def content(chosen: Iterable[Unit], setup: Setup, store: Store, earlier: Mapping[Unit, Row]) -> dict[str, Any]:
    """The content of the results: the job, the rows, also of earlier results, and what has none; see `collected`."""
    chosen = [*dict.fromkeys([*chosen, *earlier])]
    rows = collected(chosen, setup, store, earlier)
    return {
        **job_of(setup, store.most),
        "targets": setup.targets,
        "target": setup.target,
        "machines": sorted({machine for row in rows.values() for machine in row["machines"]}),
        "not_run": [[unit.setting, unit.workers, unit.contender] for unit in chosen if unit not in rows],
        "rows": [*rows.values()],
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


def planned_runs(unit: Unit, setup: Setup, row: Row | None) -> set[tuple[object, ...]]:
    """The runs that a unit lacks, as if no rate beyond the grid were tried; those that units have in common are equal.

    Args:
        unit: The unit.
        setup: The job.
        row: What there is of it.
    """
    found: set[tuple[object, ...]] = set()
    variants = variants_of(unit.contender, unit.workers, setup.momenta)
    if row is None:
        for variant in variants:
            setting = unit.setting if variant.clock is None else ""
            run = (setting, unit.workers, variant.overrides, variant.members)
            found |= {(*run, rate, seed) for rate in setup.rates[unit.workers] for seed in setup.tuning_seeds}
    # The rate and the variant that are chosen may be the same in every setting, or not.
    run = (unit.setting, unit.workers, variants[0].overrides, variants[0].members)
    return found | {(*run, "test", seed) for seed in lacking(row, setup)}


def lacking(row: Row | None, setup: Setup) -> set[int]:
    """The reported seeds that a row lacks."""
    return {*setup.seeds} - {run["seed"] for run in (row["runs"] if row else ())}
