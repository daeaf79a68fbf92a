"""The picture of the race: ratios to DDP in every setting, and curves of two."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from experiments.race import clocks
from experiments.race.contenders import CONTENDERS
from experiments.race.figures import Results, Row, best_m_sync, best_of
from experiments.race.setup import SETTINGS

SHOWN: Sequence[tuple[str, str]] = (
    ("ddp", "#333333"),
    ("ddp_nesterov", "#999999"),
    ("best m-sync", "#e69f00"),
    ("m_sync_nesterov", "#a65628"),
    ("ddp_proportional_nesterov", "#cc79a7"),
    ("local SGD or DiLoCo", "#56b4e9"),
    ("ormo", "#7fbf7b"),
    ("ormo_la", "#1b7837"),
    ("ormo_la_partial", "#762a83"),
)
"""The contenders that are drawn, and their colours."""
IDEAL = "#d62728"
CURVES = ("one_slow", "exponential")
"""The settings whose curves are drawn, with 16 workers."""
SHORT = {
    "one_slow": "one 10x slower",
    "exponential": "random",
    "none": "all alike",
    "half_slow": "half 3x slower",
    "gamma": "gamma",
}


def picture(results: Results) -> Figure:
    """Ratios for K = 4 and 16 above, curves for K = 16 below."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    (first, second), curves = figure.subplots(2, 2)
    for axes, workers in ((first, 4), (second, 16)):
        _ratios(axes, results, workers)
    lowest = min(first.get_ylim()[0], second.get_ylim()[0])
    for axes in (first, second):
        axes.set_ylim(bottom=lowest)
    for axes, setting in zip(curves, CURVES, strict=True):
        _curves(axes, results, setting)
    patches = [
        Patch(color=colour, label=_label(name))
        for name, colour in SHOWN
        if any(shown(results, setting, workers, name) for setting in SETTINGS for workers in (4, 16))
    ]
    missed = Line2D([], [], color="#333333", ls="", marker="x", label="not reached")
    figure.legend(
        handles=[*patches, missed, Line2D([], [], color=IDEAL, ls="--", label="ideal from speeds")],
        loc="outside upper center",
        ncols=5,
        frameon=False,
        fontsize="small",
    )
    return figure


def shown(results: Results, setting: str, workers: int, name: str) -> Row | None:
    """The row of a contender, or the best of several, in a cell."""
    cell = results.cell(setting, workers)
    if name == "best m-sync":
        return best_m_sync(cell)
    return best_of(cell, ("local_sgd", "diloco")) if name == "local SGD or DiLoCo" else cell.get(name)


def _label(name: str) -> str:
    return CONTENDERS[name].label if name in CONTENDERS else name


def _ratios(axes: Axes, results: Results, workers: int) -> None:
    """Bars of the time to the target over DDP's; a cross where it is not reached, a line at the ideal from the speeds."""
    settings = [setting for setting in SETTINGS if "ddp" in results.cell(setting, workers)]
    width, lowest = 0.8 / len(SHOWN), 0.1
    for number, (name, colour) in enumerate(SHOWN):
        places = [place + width * (number - (len(SHOWN) - 1) / 2) for place in range(len(settings))]
        ratios = [
            results.ratio(shown(results, setting, workers, name), shown(results, setting, workers, "ddp"), results.target)
            for setting in settings
        ]
        reached = [ratio if math.isfinite(ratio) else math.nan for ratio in ratios]
        axes.bar(places, reached, width=0.92 * width, color=colour)
        lowest = min([lowest, *(ratio for ratio in ratios if 0 < ratio < math.inf)])
        missed = [place for place, ratio in zip(places, ratios, strict=True) if math.isinf(ratio)]
        axes.plot(missed, [1.0] * len(missed), "x", color=colour)
    for place, setting in enumerate(settings):
        axes.hlines(clocks.ideal(setting, workers), place - 0.45, place + 0.45, IDEAL, linestyles="--", lw=1.2)
    axes.set_yscale("log")
    axes.set_yticks([0.1, 0.2, 0.5, 1.0, 1.5], ["0.1", "0.2", "0.5", "1", "1.5"])
    axes.minorticks_off()
    axes.set_ylim(bottom=0.8 * lowest)
    axes.axhline(1.0, color="#333333", lw=0.6)
    axes.set_xticks(range(len(settings)), [SHORT[setting] for setting in settings], fontsize="small")
    axes.set_ylabel(f"time to {results.target:.0%} over DDP's")
    axes.set_title(f"{workers} workers (less is better)", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)


def _curves(axes: Axes, results: Results, setting: str) -> None:
    """Median accuracy of each contender while all seeds have evaluations, with the band from the lowest to the highest seed."""
    reference = shown(results, setting, 16, "ddp")
    end = max((run["seconds"][-1] for run in reference["runs"]), default=1.0) if reference is not None else 1.0
    for name, colour in SHOWN:
        row = shown(results, setting, 16, name)
        runs = [run for run in row["runs"] if run["seconds"]] if row is not None else []
        if not runs:
            continue
        seconds = np.geomspace(max(run["seconds"][0] for run in runs), min(run["seconds"][-1] for run in runs), 400)
        values = np.array([np.interp(seconds, run["seconds"], _smoothed(run["accuracy"], results.smooth)) for run in runs])
        axes.plot(seconds, np.median(values, axis=0), color=colour, lw=1.3)
        axes.fill_between(seconds, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, lw=0)
    axes.set_xscale("log")
    axes.set_xlim(end / 60, end)
    axes.set_ylim(0.8, 0.895)
    axes.axhline(results.target, color="#999999", lw=0.6, ls=":")
    axes.set(xlabel="virtual seconds", ylabel="test accuracy")
    axes.set_title(f"{SETTINGS[setting]}, 16 workers", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)


def _smoothed(accuracy: Sequence[int], smooth: int) -> list[float]:
    """The mean of each evaluation and those before it."""
    return [
        sum(accuracy[max(0, n + 1 - smooth) : n + 1]) / len(accuracy[max(0, n + 1 - smooth) : n + 1]) / 10_000
        for n in range(len(accuracy))
    ]
