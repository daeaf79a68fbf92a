"""The goals of the race: which ratio to which rival the best asynchronous rule is to reach, and whether it does."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from experiments.race import clocks
from experiments.race.contenders import ASYNCHRONOUS, CONTENDERS
from experiments.race.figures import (
    M_SYNC,
    M_SYNC_NESTEROV,
    Results,
    Row,
    best_asynchronous,
    best_m_sync,
    best_m_sync_nesterov,
    rates_tried,
)
from experiments.race.formatting import from_to, label, shown
from experiments.race.setup import CELLS, SETTINGS
from ormo_rpc.report.table import MISSING, as_markdown, spread


@dataclass(frozen=True)
class Goal:
    """A ratio of times to the tuning target that the best asynchronous rule is to reach.

    Attributes:
        setting: The speeds.
        workers: K.
        against: The rival in words.
        rival: Chooses it from a cell.
        ideal: The ratio by the speeds alone.
        bound: The ratio to reach; None: it is told, as a rival that the goals do not name.
    """

    setting: str
    workers: int
    against: str
    rival: Callable[[Mapping[str, Row]], Row | None]
    ideal: float
    bound: float | None


def _goals() -> Iterator[Goal]:
    def ddp(cell: Mapping[str, Row]) -> Row | None:
        return cell.get("ddp")

    def nesterov(cell: Mapping[str, Row]) -> Row | None:
        return cell.get("ddp_nesterov")

    def goal(
        setting: str, workers: int, against: str, rival: Callable[[Mapping[str, Row]], Row | None], bound: float | None
    ) -> Goal:
        ideal = clocks.ideal_of_best_m if rival in (best_m_sync, best_m_sync_nesterov) else clocks.ideal
        return Goal(setting, workers, against, rival, ideal(setting, workers), bound)

    for setting, bounds in (("one_slow", (0.13, 0.12)), ("exponential", (0.5, 0.46)), ("none", (1.0, 1.1))):
        yield from (goal(setting, workers, "DDP", ddp, bound) for workers, bound in zip((4, 16), bounds, strict=True))
    yield goal("half_slow", 4, "DDP", ddp, 0.5)
    for workers, bound in ((4, 0.65), (16, 0.5)):
        yield goal("exponential", workers, "DDP, Nesterov", nesterov, bound)
    for setting, bounds in (("one_slow", (0.97, 1.0)), ("exponential", (0.65, 0.65))):
        yield from (
            goal(setting, workers, "best m-sync", best_m_sync, bound) for workers, bound in zip((4, 16), bounds, strict=True)
        )
    yield goal("half_slow", 4, "best m-sync", best_m_sync, 0.75)
    for setting in SETTINGS:
        yield from (goal(setting, workers, "best m-sync, Nesterov", best_m_sync_nesterov, None) for workers in (4, 16))


GOALS: Sequence[Goal] = tuple(_goals())
ACCURACY_BOUND = -0.001
"""Last accuracy of the best asynchronous rule minus that of DDP, at equal epochs, that is to be reached."""


def goals(results: Results) -> list[tuple[str, ...]]:
    """A row for each goal that was measured: the best asynchronous rule by validation, its ratio, whether that is reached."""
    found = [
        (
            "setting",
            "K",
            "against",
            "ideal from speeds",
            "goal",
            "measured",
            "seed by seed",
            "best asynchronous rule",
            "rival",
            "reached",
        )
    ]
    for goal in GOALS:
        cell = results.cell(goal.setting, goal.workers)
        mine, rival = best_asynchronous(cell), goal.rival(cell)
        if mine is None or rival is None:
            continue
        ratio = results.ratio(mine, rival, results.target)
        found.append(
            (
                *(goal.setting, str(goal.workers), goal.against, f"{goal.ideal:.3g}"),
                *(MISSING if goal.bound is None else f"<= {goal.bound:g}", shown(ratio)),
                *(" ".join(map(shown, results.ratios(mine, rival, results.target))), label(mine), label(rival)),
                MISSING if math.isnan(ratio) or goal.bound is None else "yes" if ratio <= goal.bound else "no",
            )
        )
    return found


def budgets(results: Results) -> str:
    """The rates from which the best rules were chosen: the budgets are equal by variant, not by kind of rule."""
    kinds: dict[str, Sequence[str]] = {
        "the best asynchronous rule": ASYNCHRONOUS,
        "the best synchronous rule": [name for name in CONTENDERS if name not in ASYNCHRONOUS],
        "DDP": ("ddp",),
        "DDP with Nesterov momentum": ("ddp_nesterov",),
        "the best m-sync": M_SYNC,
        "the best m-sync with Nesterov momentum": M_SYNC_NESTEROV,
    }
    cells = [_tuned(results.cell(setting, workers)) for setting, workers in CELLS]
    tried = {
        kind: sorted({sum(rates_tried(row) for row in cell if row["contender"] in names) for cell in cells} - {0})
        for kind, names in kinds.items()
    }
    told = "; ".join(f"{kind}: {from_to(counts)}" for kind, counts in tried.items() if counts)
    return f"Learning rates tried in a cell, on validation samples, over all rules and variants of a kind: {told}."


def _tuned(cell: Mapping[str, Row]) -> list[Row]:
    """Return the rows of a cell without those that reuse the tuning of the contender named by their ``tuned_as``."""
    originals = {name: cell.get(CONTENDERS[name].tuned_as) for name in cell}
    return [row for name, row in cell.items() if (original := originals[name]) is None or row["tuning"] != original["tuning"]]


def accuracies(results: Results) -> str:
    """The last accuracies at equal epochs."""
    found = [("setting", "K", "best asynchronous rule", "DDP", "difference", f"at least {ACCURACY_BOUND:.1%}")]
    for setting, workers in CELLS:
        cell = results.cell(setting, workers)
        mine, ddp = best_asynchronous(cell), cell.get("ddp")
        own, others = results.last_of_shared(mine, ddp)
        if mine is not None and own:
            difference = statistics.fmean(own) - statistics.fmean(others)
            told = "yes" if difference >= ACCURACY_BOUND else "no"
            both = f"{label(mine)}: {spread(own, '.2%')}", spread(others, ".2%")
            found.append((setting, str(workers), *both, f"{difference:+.2%}", told))
    if len(found) == 1:
        return ""
    return (
        "Accuracy in the end, at equal epochs, with the rate that was chosen by time, over the seeds that both have:\n\n"
        f"{as_markdown(found)}"
    )
