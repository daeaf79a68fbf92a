"""The tables of the race, ``results/race.md``, from ``results/race.json``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.common import pictures, write_results
from experiments.race import clocks
from experiments.race.contenders import ASYNCHRONOUS, CONTENDERS, Variant, variants_of
from experiments.race.figures import (
    Results,
    Row,
    best_asynchronous,
    best_m_sync,
    best_synchronous,
    rates_tried,
)
from experiments.race.formatting import from_to, label, shown
from experiments.race.goals import accuracies, budgets, goals
from experiments.race.picture import picture
from experiments.race.setup import CELLS, RACE, SETTINGS, Race
from ormo_rpc.report.table import MISSING, as_markdown, spread

MORE_TARGETS = (0.85, 0.86, 0.87, 0.875, 0.88)
"""Accuracies at which the best rules are compared, since one target alone may flatter either."""


def write(content: Mapping[str, Any], into: Path, race: Race = RACE) -> None:
    """Write tables and picture beside the results; the picture of the results of the repository goes to ``docs/``.

    Args:
        content: The content of the results.
        into: Their folder.
        race: What they are of; another job than the race's has tables alone.
    """
    results = Results(content)
    write_results(into / f"{race.name}.md", page(results, race))
    if race == RACE:
        picture(results).savefig(pictures(into) / "race.png", dpi=110)


def page(results: Results, race: Race = RACE) -> str:
    """The page: what was run, the goals that were measured, and a table for each cell."""
    parts = ["# The race", _stated(results, race)]
    if race.goals:
        parts += ["## Goals", as_markdown(goals(results))]
    parts += [budgets(results), accuracies(results), _at_each_target(results), _lost(results)]
    if race.rates:
        parts.append(_rates(results))
    for setting, workers in CELLS:
        cell = results.cell(setting, workers)
        if cell:
            heading = f"## {SETTINGS[setting][0].upper()}{SETTINGS[setting][1:]} (`{setting}`), K = {workers}"
            parts += [heading, _ideals(setting, workers), as_markdown(table(results, setting, workers))]
    return "\n\n".join(filter(None, [*parts, _not_run(results)])) + "\n"


def _at_each_target(results: Results) -> str:
    """The best asynchronous rule against the best synchronous one, both by validation, at several accuracies."""
    at = (f"{100 * each:.3g}%" for each in MORE_TARGETS)
    found: list[tuple[str, ...]] = [
        (*("setting", "K", "best asynchronous rule", "best synchronous rule"), *at, "accuracy in the end", "seeds")
    ]
    for setting, workers in CELLS:
        cell = results.cell(setting, workers)
        mine, rival = best_asynchronous(cell), best_synchronous(cell)
        own, others = results.last_of_shared(mine, rival)
        if mine is not None and rival is not None and own:
            ratios = (shown(results.ratio(mine, rival, target)) for target in MORE_TARGETS)
            difference = f"{statistics.fmean(own) - statistics.fmean(others):+.2%}"
            found.append((setting, str(workers), label(mine), label(rival), *ratios, difference, str(len(own))))
    if len(found) == 1:
        return ""
    return (
        "The best asynchronous rule against the best synchronous one, both as validation chose them (of equal times the first "
        "of the tables): the ratio of the times "
        "to each accuracy, and the difference of the accuracies in the end, over the seeds that both have:\n\n"
        f"{as_markdown(found)}"
    )


def table(results: Results, setting: str, workers: int) -> list[tuple[str, ...]]:
    """A row for each contender of a cell."""
    cell, targets = results.cell(setting, workers), results.content["targets"]
    ddp, m_sync = cell.get("ddp"), best_m_sync(cell)
    header = (
        *("contender", "rate", "rates tried", "reached"),
        *(f"s to {target:.0%}" for target in targets),
        *(f"of DDP, {target:.0%}" for target in targets),
        *(f"of best m-sync, {results.target:.0%}", "accuracy in the end", "seconds in all"),
    )
    found = [header]
    for row in sorted(cell.values(), key=lambda row: [*CONTENDERS].index(row["contender"])):
        reached = sum(map(math.isfinite, results.times(row, results.target).values()))
        diverged = f", {results.diverged(row)} diverged" if results.diverged(row) else ""
        found.append(
            (
                *(label(row), f"{row['rate']:g}", str(rates_tried(row)), f"{reached} of {len(row['runs'])}{diverged}"),
                *(shown(results.time(row, target), ".1f") for target in targets),
                *(_compared(results, row, ddp, target) for target in targets),
                _compared(results, row, m_sync, results.target),
                spread(results.last(row), ".2%"),
                spread([run["seconds"][-1] for run in row["runs"] if run["seconds"]], ".1f"),
            )
        )
    return found


def _compared(results: Results, row: Row, rival: Row | None, target: float) -> str:
    """A ratio for a table, with the number of seeds that both have where it is not that of each."""
    ratio = shown(results.ratio(row, rival, target))
    if rival is None or ratio == MISSING or len(row["runs"]) == len(rival["runs"]) == results.shared(row, rival):
        return ratio
    return f"{ratio} ({results.shared(row, rival)} seeds of both)"


def _ideals(setting: str, workers: int) -> str:
    return (
        f"From the speeds alone asynchrony would need {clocks.ideal(setting, workers):.3g} of DDP's time, and "
        f"{clocks.ideal_of_best_m(setting, workers):.3g} of that of the best m-synchronous SGD that cancels."
    )


def _lost(results: Results) -> str:
    """The cells in which no asynchronous rule is the fastest."""
    found: list[str] = []
    for setting, workers in CELLS:
        cell = results.cell(setting, workers)
        mine = best_asynchronous(cell)
        if mine is None:
            continue
        rivals = [row for row in cell.values() if row["contender"] not in ASYNCHRONOUS]
        compared = [(*results.medians(row, mine, results.target), label(row)) for row in rivals]
        faster = sorted((time, own, name) for time, own, name in compared if time < own)
        if faster:
            time, own, name = faster[0]
            reached = "does not reach it" if math.isinf(own) else f"{own:.1f} s"
            found.append(f"* {setting}, K = {workers}: {name} needs {time:.1f} s, {label(mine)} {reached}")
    if not found:
        return ""
    return (
        f"Where a synchronous rule reaches {results.target:.0%} sooner than the asynchronous one that validation puts first "
        "(medians over the seeds that both have):\n\n" + "\n".join(found)
    )


def _rates(results: Results) -> str:
    """The rates that were chosen, in units of ``train.lr``: where to begin with a rule."""
    counts = sorted({row["workers"] for row in results.rows})
    found = [("contender", *(f"`train.lr`, K = {workers}" for workers in counts))]
    for name, contender in CONTENDERS.items():
        rates = [
            sorted(
                {
                    row["rate"] / _variant(row, results).divisor
                    for row in results.rows
                    if (row["contender"], row["workers"]) == (name, workers)
                }
            )
            for workers in counts
        ]
        if any(rates):
            found.append((contender.label, *(from_to(each) for each in rates)))
    return (
        "## Rates to begin with\n\nThe chosen rates over all settings, as `train.lr` of the rule (of DDP with `runtime=ddp`; a "
        f"rule that applies each gradient as it comes has the K-th part of a rate of means):\n\n{as_markdown(found)}"
    )


def _variant(row: Row, results: Results) -> Variant:
    variants = variants_of(row["contender"], row["workers"], results.content["momenta"])
    return next((each for each in variants if each.name == row["variant"]), variants[0])


def _not_run(results: Results) -> str:
    """The units that are missing."""
    missing: dict[str, list[str]] = {}
    for setting, workers, name in results.content["not_run"]:
        missing.setdefault(f"{setting}, K = {workers}", []).append(CONTENDERS[name].label)
    lines = [f"* {cell}: {'; '.join(names)}" for cell, names in missing.items()]
    return "## Not run\n\n" + "\n".join(lines) if lines else ""


def _of_partial(results: Results) -> Iterator[str]:
    """Two remarks on the variants of the contender that answers workers together, where it was run."""
    if any(row["contender"] == "ormo_la_partial" for row in results.rows):
        yield "`ormo_la, partial` answers k workers together, and drops nothing; with k = 1 it is `ormo_la`, up to rounding."
        yield "Its k were chosen after runs with 15, 12 and 8 of 16 had been seen with none, one_slow and exponential."


def _of_the_same_updates(results: Results) -> Iterator[str]:
    """A remark on the contenders that are tuned as another one is, where they have its rates."""
    rates = {(row["setting"], row["workers"], row["contender"]): row["rate"] for row in results.rows}
    for name, contender in CONTENDERS.items():
        pairs = [(rate, rates.get((*cell, contender.tuned_as))) for (*cell, each), rate in rates.items() if each == name]
        if contender.tuned_as and pairs and all(rate == other for rate, other in pairs):
            as_tuned = CONTENDERS[contender.tuned_as].label
            yield f"`{contender.label}` has the updates of `{as_tuned}` at other times, and its rates."


def _stated(results: Results, race: Race) -> str:
    content = results.content
    command = " ".join(filter(None, ("python -m experiments.race", race.option)))
    momenta = ", ".join(f"{each:g}" for each in content["momenta"])
    of_momentum = "" if len(content["momenta"]) == 1 else " (each makes a variant of every variant)"
    tried = [each for row in results.rows for each in CONTENDERS[row["contender"]].variants(row["workers"])]
    rarest = max((each.between(content["every"]) for each in tried), default=content["every"])
    seeds = sorted({run["seed"] for row in results.rows for run in row["runs"]})
    grids = "; ".join(
        f"K = {workers}: {', '.join(f'{rate:g}' for rate in rates)}"
        for workers, rates in content["rates"].items()
        if any(row["workers"] == int(workers) for row in results.rows)
    )
    lines = (
        f"`{command}`, simulated:",
        f"{', '.join(content['job'])}, {content['epochs']} epochs of batches of",
        f"{content['batch_size']}, constant rate, momentum {momenta}{of_momentum}. Virtual seconds; a gradient takes 0.1 where",
        "nothing slows it down, network and server nothing. Each variant of each contender in each cell has the same",
        f"budget: the rates of a grid ({grids}), and while the best is at an edge the next one, up to {content['beyond']},",
        f"each with {len(content['tuning_seeds'])} seeds of their own, judged by the time to",
        f"{content['tuning_target']:.1%} on a validation split; where that is not reached,",
        "by the last accuracy. Rates are those of a step with the mean of a round; ormo and its kin run with the K-th part.",
        f"Times are medians over seeds {', '.join(map(str, seeds))} on the test split (over those that a contender has),",
        "ratios those of the medians over the seeds that both have; each is the time at which the mean of",
        f"{content['smooth']} evaluations in a row, about every {content['every']} gradients and at the end of a round",
        f"(so up to {rarest:,} apart, with the longest rounds that were tried, which those are judged by), reaches the target;",
        "accuracies in the end are the mean of the last",
        f"{content['smooth']}, with mean and standard deviation over seeds.",
        *_of_partial(results),
        *_of_the_same_updates(results),
        f"Runs were made with {' and '.join(content['machines']) or MISSING}, 1 thread.",
    )
    return " ".join(lines)
