"""Pictures of runs: curves of a comparison, and the delays and the timeline of a single run."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ormo_rpc.loggers.metrics import key_of
from ormo_rpc.report.runs import Group, Run, differing_keys
from ormo_rpc.storage.summary import described
from ormo_rpc.tasks.metrics import TaskMetric

TIMELINE_TICKETS = 80
"""Updates that the timeline covers."""


def comparison(groups: Sequence[Group]) -> Figure:
    """Plot losses and the main metric over epochs and seconds, for each task: a line per seed and a colour per group."""
    kinds = [*dict.fromkeys((group.setting.get("task"), group.runs[0].main_metric.name) for group in groups)]
    figure = Figure(figsize=(11, 8 * len(kinds)), layout="constrained")
    axes = figure.subplots(2 * len(kinds), 2)
    keys = differing_keys(groups)
    colours = matplotlib.colormaps["tab20"]
    for number, group in enumerate(groups):
        metric = group.runs[0].main_metric
        first = 2 * kinds.index((group.setting.get("task"), metric.name))
        style = {"color": colours(number % 20), "linewidth": 1.0}
        for run in group.runs:
            label = group.label(keys) if run is group.runs[0] else None
            for row, (epochs, seconds, values) in enumerate((run.losses(), run.evaluated(key_of("test", metric.name)))):
                marker = "." if row else ""
                axes[first + row][0].plot(epochs, values, label=label, marker=marker, **style)
                axes[first + row][1].plot(seconds, values, marker=marker, **style)
        for column, unit in enumerate(("epochs", _seconds(groups))):
            axes[first][column].set(xlabel=unit, ylabel="training loss")
            axes[first + 1][column].set(xlabel=unit, ylabel=_name(metric))
    for each in axes.flat:
        each.grid(alpha=0.3)
    for each in axes[::2].flat:
        _logarithmic(each)
    for each in axes[::2, 0]:
        each.legend(fontsize="small")
    return figure


def single(run: Run) -> Figure:
    """Plot loss and main metric over seconds, the histogram of delays, and the timeline of the workers."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    loss_axes, metric_axes, delay_axes, timeline_axes = figure.subplots(2, 2).flat
    summary, metric = run.summary, run.main_metric
    figure.suptitle(f"{described(summary)}: {summary['status']}")
    for axes, (_, seconds, values), name in (
        (loss_axes, run.losses(), "training loss"),
        (metric_axes, run.evaluated(key_of("test", metric.name)), _name(metric)),
    ):
        axes.plot(seconds, values, marker="." if axes is metric_axes else "")
        axes.set(xlabel=_unit(simulated=summary.get("runtime") == "sim"), ylabel=name)
        axes.grid(alpha=0.3)
    _logarithmic(loss_axes)
    _delays(delay_axes, run)
    _timeline(timeline_axes, run)
    return figure


def _name(metric: TaskMetric) -> str:
    return f"test {metric.name} ({'higher' if metric.higher_is_better else 'lower'} is better)"


def _logarithmic(axes: Axes) -> None:
    """Have a logarithmic axis of losses, unless one is negative or all are 0: a loss of the user's own may be anything."""
    values = [float(value) for line in axes.lines for value in np.asarray(line.get_ydata())]
    if not any(value < 0 for value in values) and any(value > 0 for value in values):
        axes.set_yscale("log")


def _seconds(groups: Sequence[Group]) -> str:
    simulated = {group.setting.get("runtime") == "sim" for group in groups}
    return "seconds, virtual ones of simulations" if len(simulated) > 1 else _unit(simulated=simulated.pop())


def _unit(*, simulated: bool) -> str:
    return "virtual seconds" if simulated else "seconds"


def _delays(axes: Axes, run: Run) -> None:
    delays = [event["delay"] for event in run.of_kind("apply")]
    counts = np.bincount(delays) if delays else np.zeros(1, dtype=np.int64)
    axes.bar(np.arange(len(counts)), counts, width=1.0)
    axes.set(xlabel="delay (iterations)", ylabel="gradients", yscale="log" if delays else "linear")


def _timeline(axes: Axes, run: Run) -> None:
    """Draw a bar per ticket from issue to application, coloured by delay, for the first `TIMELINE_TICKETS` updates."""
    applied = run.of_kind("apply")
    end = applied[:TIMELINE_TICKETS][-1]["seconds"] if applied else 1.0
    began: dict[tuple[int, int], float] = {}
    bars: list[tuple[int, float, float, int]] = []
    for event in run.of_kind("issue", "reissue", "apply"):
        key = (event["worker"], event["ticket"])
        if event["event"] != "apply":
            began[key] = event["seconds"]
        elif began.get(key, end) < end:
            bars.append((event["worker"], began[key], event["seconds"] - began[key], event["delay"]))
    most = max((delay for *_, delay in bars), default=1) or 1
    colours = matplotlib.colormaps["viridis"]
    for worker, start, length, delay in bars:
        axes.barh(worker, length, left=start, height=0.8, color=colours(delay / most), edgecolor="white", linewidth=0.5)
    axes.set(xlabel=_unit(simulated=run.summary.get("runtime") == "sim"), ylabel="worker", xlim=(0, end))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("the first gradients, from issue to update; brighter means a larger delay", fontsize="small")
