"""The page of `experiments.look_ahead_nets`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from experiments.on_device import machine_in_words
from experiments.race.contenders import CONTENDERS
from experiments.race.figures import Results
from experiments.race.formatting import label, shown
from ormo_rpc.report.table import as_markdown, spread

RIVALS = ("ormo", "ddp_nesterov")
"""Rules by whose times the others' are divided."""


def page(found: Mapping[str, Any]) -> str:
    """The page of the results."""
    parts = ["# Look-ahead on convolution nets"]
    for net, each in found["nets"].items():
        results = Results(each)
        cells = dict.fromkeys((row["setting"], row["workers"]) for row in results.rows)
        parts += [f"## {net}", stated(results)]
        for setting, workers in cells:
            parts += [f"### `{setting}`, K = {workers}", as_markdown(table(results, setting, workers))]
        missing = [f"{CONTENDERS[name].label} ({setting})" for setting, _, name in each["not_run"]]
        if missing:
            parts.append(f"Not finished, and left out: {', '.join(missing)}.")
    parts += dict.fromkeys(f"{machine_in_words(each)}." for each in found["environments"])
    return "\n\n".join(parts) + "\n"


def stated(results: Results) -> str:
    """The job and the procedure in words."""
    job, rates = results.content, next(iter(results.content["rates"].values()))
    seeds = sorted({run["seed"] for row in results.rows for run in row["runs"]})
    return (
        f"`python -m experiments.look_ahead_nets`, simulated: {', '.join(job['job'])}, {job['epochs']} epochs of batches of "
        f"{job['batch_size']}, constant rate, momentum 0.9. Virtual seconds; a gradient takes 0.1 where nothing slows it down. "
        f"Each rule has the rates {', '.join(f'{rate:g}' for rate in rates)} and, while the best is at an edge, up to three "
        f"beyond it, judged by the time to {job['tuning_target']:.0%} on held-out samples with {len(job['tuning_seeds'])} "
        "seed of its own, and where none gets there by the last accuracy; a variant has as many. Rates are those of a step "
        "with the mean of a round; a rule that adds each gradient gets the K-th part. Times are medians over those of the "
        f"seeds {', '.join(map(str, seeds))} that a rule has, on the test split, each the time at which the mean of "
        f"{job['smooth']} evaluations in a row, one about every 100 gradients, reaches the accuracy; in brackets those of the "
        f"seeds. The accuracy in the end is the mean of the last {job['smooth']}, with mean and standard deviation over them."
    )


def table(results: Results, setting: str, workers: int) -> list[tuple[str, ...]]:
    """A row for each rule of a setting."""
    cell, targets, target = results.cell(setting, workers), results.content["targets"], results.target
    found: list[tuple[str, ...]] = [
        (
            *("rule", "rate", "rates tried"),
            *(f"s to {each:.0%}" for each in targets),
            *(f"of {CONTENDERS[rival].label}, {target:.0%}" for rival in RIVALS),
            *("accuracy in the end", "seconds in all", "made with"),
        )
    ]
    for name in sorted(cell, key=[*CONTENDERS].index):
        row = cell[name]
        found.append(
            (
                *(label(row), f"{row['rate']:g}", str(sum(map(len, row["tuning"].values())))),
                *(_times(results, row, each) for each in targets),
                *(shown(results.ratio(row, cell.get(rival), target)) for rival in RIVALS),
                spread(results.last(row), ".2%"),
                spread([run["seconds"][-1] for run in row["runs"] if run["seconds"]], ".1f"),
                "; ".join(row["machines"]),
            )
        )
    return found


def _times(results: Results, row: Mapping[str, Any], target: float) -> str:
    """The median time to a target, and that of each seed."""
    each = " ".join("never" if math.isinf(time) else f"{time:.1f}" for time in results.times(row, target).values())
    return f"{shown(results.time(row, target), '.1f')} ({each})"
