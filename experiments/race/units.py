"""Units of the race: one contender in one cell, tuned and run with the reported seeds."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from experiments.race import clocks
from experiments.race.contenders import CONTENDERS, FIRST, Variant, record, variants_of
from experiments.race.figures import Row
from experiments.race.runs import Missing, Record, Store, code_of, rule_options, rule_version
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


Runner = Callable[[Variant, float, int, str, float], Record]
"""``run(variant, rate, seed, split, limit)``, see `record`."""
CHOICE = ("variant", "rate", "tuning", "validation_accuracy", "validation_time")
"""The keys of a row that tell of the tuning."""


def outcome(unit: Unit, setup: Setup, store: Store, earlier: Row | None = None) -> dict[str, Any]:
    """Tune a contender, run it with the reported seeds, and return its row of the results.

    Args:
        unit: The contender and its cell.
        setup: The job.
        store: Has the runs, and makes those that are missing.
        earlier: A row of `earlier_rows`: its choice stands, and its seeds are not run again.

    Raises:
        Missing: a run is missing that must not be made now.
    """
    machines = set[str](() if earlier is None else earlier["machines"])

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

    variants = {each.name: each for each in variants_of(unit.contender, unit.workers, setup.momenta)}
    choice = _choice(variants, setup, unit.workers, run) if earlier is None else {key: earlier[key] for key in CHOICE}
    seeds: dict[int, Any] = {} if earlier is None else {each["seed"]: each for each in earlier["runs"]}
    for seed in setup.seeds:
        if seed not in seeds:
            seeds[seed] = shortened(seed, run(variants[choice["variant"]], choice["rate"], seed, "test"))
    return {
        **dataclasses.asdict(unit),
        **choice,
        "version": version(unit),
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


def version(unit: Unit) -> str:
    """A digest of a contender's variants, the source of their rules, and the clocks of rounds."""
    variants = [
        [
            *dataclasses.astuple(dataclasses.replace(each, clock=None)),
            each.clock is None,
            rule_version(rule_options(each.overrides)),
        ]
        for each in CONTENDERS[unit.contender].variants(unit.workers)
    ]
    return hashlib.sha256(json.dumps([variants, code_of(clocks.__name__)]).encode()).hexdigest()[:16]


def earlier_rows(results: Mapping[str, Any] | None, setup: Setup) -> dict[Unit, Row]:
    """The rows of results, perhaps of another machine, that are not to be made again: of the same job, and rules as they are.

    Args:
        results: The content of the results; None where there are none.
        setup: The job.
    """
    job = json.loads(json.dumps(_stated(setup)))
    if results is None or any(results.get(key) != value for key, value in job.items()):
        return {}
    rows = {Unit(row["setting"], row["workers"], row["contender"]): row for row in results["rows"]}
    return {unit: row for unit, row in rows.items() if unit.contender in CONTENDERS and row.get("version") == version(unit)}


def collected(
    chosen: Iterable[Unit], setup: Setup, store: Store, earlier: Mapping[Unit, Row]
) -> tuple[list[dict[str, Any]], list[Unit]]:
    """The rows of the units that are finished, with as many seeds as there are, and the other units.

    Args:
        chosen: The units.
        setup: The job.
        store: Has runs, and makes none.
        earlier: Rows of `earlier_rows`.
    """
    rows, missing = list[dict[str, Any]](), list[Unit]()
    for unit in chosen:
        row = None
        with contextlib.suppress(Missing):
            for count in range(len(setup.seeds), MOST_SEEDS + 1):
                row = outcome(unit, dataclasses.replace(setup, seeds=tuple(range(count))), store, earlier.get(unit))
        if row is None:
            missing.append(unit)
        else:
            rows.append(row)
    return rows, missing


def content(chosen: Iterable[Unit], setup: Setup, store: Store, earlier: Mapping[Unit, Row]) -> dict[str, Any]:
    """The content of the results: the job, the units that are finished, and which are not; see `collected`."""
    rows, missing = collected(chosen, setup, store, earlier)
    return {
        **_stated(setup),
        "machines": sorted({machine for row in rows for machine in row["machines"]}),
        "not_run": [[unit.setting, unit.workers, unit.contender] for unit in missing],
        "rows": rows,
    }


def _stated(setup: Setup) -> dict[str, Any]:
    """The job in the results, without the reported seeds."""
    return {
        "momenta": setup.momenta,
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
    variants = variants_of(unit.contender, unit.workers, setup.momenta)
    for variant in variants:
        setting = unit.setting if variant.clock is None else ""
        run = (setting, unit.workers, variant.overrides, variant.members)
        found |= {(*run, rate, seed) for rate in setup.rates[unit.workers] for seed in setup.tuning_seeds}
    # The rate and the variant that are chosen may be the same in every setting, or not.
    found |= {(unit.setting, unit.workers, variants[0].overrides, variants[0].members, "test", seed) for seed in setup.seeds}
    return found
