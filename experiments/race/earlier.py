"""Earlier results, perhaps of another machine: which of their rows count."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.race import tuning
from experiments.race.contenders import CONTENDERS, Unit, Variant, draws, round_ends, variants_of
from experiments.race.figures import Row
from experiments.race.setup import SETTINGS, Setup
from experiments.race.versions import code_of, run_version
from ormo_rpc.errors import ConfigError

KEYS = ("targets", "target", "machines", "not_run", "rows")
"""Keys of results beside those of `job_of`."""


def job_of(setup: Setup, most: int | None = None) -> dict[str, Any]:
    """All that determines rows but for the reported seeds, device and precision, as JSON has it.

    Args:
        setup: The job.
        most: Samples of the validation split that are evaluated, at most; None for all.
    """
    found = {
        "momenta": setup.momenta,
        "epochs": setup.epochs,
        "batch_size": setup.batch_size,
        "tuning_target": setup.tuning_target,
        "smooth": setup.smooth,
        "tuning_seeds": setup.tuning_seeds,
        "rates": {workers: sorted(rates) for workers, rates in setup.rates.items()},
        "beyond": setup.beyond,
        "every": setup.every,
        "most": most,
        "job": setup.job,
    }
    return json.loads(json.dumps(found))


def version(unit: Unit, setup: Setup) -> str:
    """A digest of what else determines a row: variants, `run_version`, the source of the tuning, and the first times."""
    variants = [
        [
            *(each.name, each.overrides, each.members, each.divisor, each.steps),
            *(run_version((*setup.job, *each.overrides)), _first_times(unit, each, setup)),
        ]
        for each in variants_of(unit.contender, unit.workers, setup.momenta)
    ]
    return hashlib.sha256(json.dumps([variants, code_of(tuning.__name__)]).encode()).hexdigest()[:16]


def _first_times(unit: Unit, variant: Variant, setup: Setup) -> list[str]:
    """The first times of a variant in a cell: of rounds, or of each worker."""
    if variant.clock is None:
        draw = draws(unit.setting, unit.workers, 0)
        times = [draw(worker) for worker in range(unit.workers)]
    else:
        times = round_ends(variant, unit.setting, unit.workers, 0, 3, batch_size=setup.batch_size)
    return [f"{time:.4g}" for time in times]


def earlier_rows(
    file: Path, results: Mapping[str, Any] | None, setup: Setup, *, most: int | None = None, replace: bool = False
) -> dict[Unit, Row]:
    """The rows of earlier results, which are not made again.

    Args:
        file: Where they are.
        results: Their content; None where there are none.
        setup: The job.
        most: Samples of the validation split, at most; None for all.
        replace: Leave those out that do not count: of another job, or of a rule, variant or time that has changed or is gone.

    Raises:
        ConfigError: there are such rows, and they are not to be left out.
    """
    if results is None:
        return {}
    rows = {Unit(row["setting"], row["workers"], row["contender"]): row for row in results["rows"]}
    job = job_of(setup, most)
    differing = [key for key, value in job.items() if results.get(key) != value]
    counted = {
        unit: row
        for unit, row in rows.items()
        if not differing
        and unit.contender in CONTENDERS
        and unit.setting in SETTINGS
        and row.get("version") == version(unit, setup)
    }
    if len(counted) < len(rows) and not replace:
        first = next(unit for unit in rows if unit not in counted)
        why = f"with other {', '.join(differing)}" if differing else "of rules, variants or times that have changed since"
        raise ConfigError(
            f"{file}: got {len(rows) - len(counted)} of {len(rows)} rows {why}, such as {first}, expected rows as they would "
            "be made now; leave them out with --replace, or name another folder by --into"
        )
    return counted
