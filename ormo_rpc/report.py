"""Pictures and a table of finished runs: ``python -m ormo_rpc.report RUN_DIRECTORY ...``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ormo_rpc.config import ConfigError
from ormo_rpc.run_directory import read_summary, read_trace

TIMELINE_TICKETS = 80
"""How many updates the timeline reaches over."""


@dataclass(frozen=True)
class Run:
    """What a run left behind.

    Attributes:
        path: Its directory.
        summary: The content of ``summary.json``.
        metrics: The rows of ``metrics.jsonl``.
        events: The events of ``trace.jsonl``, without the header.
    """

    path: Path
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read a run directory.

        Raises:
            ConfigError: it is not that of a finished run.
        """
        summary = read_summary(path)
        if summary is None or "iterations" not in summary:
            raise ConfigError(f"{path}: got a folder without the summary of a run, expected a run directory")
        return cls(path, summary, _lines(path / "metrics.jsonl"), read_trace(path)[1])

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """The values of a metric, and the seconds at which they were taken."""
        rows = [row for row in self.metrics if row.get(name) is not None]
        return [row["seconds"] for row in rows], [row[name] for row in rows]

    def losses(self) -> tuple[list[float], list[float]]:
        """The mean loss of each batch when its gradient was applied, averaged over about the last 20, and those times."""
        seconds: list[float] = []
        averages: list[float] = []
        for event in self.of_kind("apply"):
            if event["loss"] is not None:
                former = averages[-1] if averages else event["loss"]
                averages.append(former + (event["loss"] - former) / 20)
                seconds.append(event["seconds"])
        return seconds, averages

    def of_kind(self, *kinds: str) -> list[dict[str, Any]]:
        """The events of some kinds, in order."""
        return [event for event in self.events if event["event"] in kinds]


def picture(run: Run) -> Figure:
    """Loss and accuracy against seconds, the delays of the gradients, and who computed what when."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    loss_axes, accuracy_axes, delay_axes, timeline_axes = figure.subplots(2, 2).flat
    summary = run.summary
    figure.suptitle(
        f"{summary['algorithm']} ({summary['scheduler']}), {summary['num_workers']} workers, "
        f"{summary['dataset']}, {summary['model']}: {summary['status']}"
    )
    _curve(loss_axes, *run.losses(), "training loss")
    loss_axes.set_yscale("log")
    _curve(accuracy_axes, *run.series("test_accuracy"), "test accuracy", marker=".")
    _delays(delay_axes, run)
    _timeline(timeline_axes, run)
    return figure


def table(runs: Sequence[Run]) -> str:
    """One line per run: what it was, and how it ended."""
    header = ("algorithm", "scheduler", "workers", "seed", "status", "iterations", "loss", "accuracy", "seconds", "delay")
    rows: list[tuple[str, ...]] = [header]
    for run in runs:
        s = run.summary
        loss = "-" if s["train_loss"] is None else f"{s['train_loss']:.4f}"
        accuracy = "-" if s["test_accuracy"] is None else f"{s['test_accuracy']:.2%}"
        numbers = (str(s["iterations"]), loss, accuracy, f"{s['wall_seconds']:.1f}", f"{s['delay_mean']:.1f}")
        rows.append((s["algorithm"], s["scheduler"], str(s["num_workers"]), str(s["seed"]), s["status"], *numbers))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m ormo_rpc.report", description=__doc__)
    parser.add_argument("paths", type=Path, nargs="+", metavar="RUN_DIRECTORY", help="where report.png goes, too")
    matplotlib.use("agg")
    try:
        runs = [Run.load(path) for path in parser.parse_args().paths]
    except ConfigError as error:
        print(f"report: {error}", file=sys.stderr)
        sys.exit(2)
    for run in runs:
        picture(run).savefig(run.path / "report.png", dpi=100)
    print(table(runs))
    print("\n".join(str(run.path / "report.png") for run in runs))


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _curve(axes: Axes, seconds: list[float], values: list[float], name: str, marker: str = "") -> None:
    axes.plot(seconds, values, marker=marker)
    axes.set(xlabel="seconds", ylabel=name)
    axes.grid(alpha=0.3)


def _delays(axes: Axes, run: Run) -> None:
    delays = [event["delay"] for event in run.of_kind("apply")]
    counts = np.bincount(delays) if delays else np.zeros(1, dtype=np.int64)
    axes.bar(np.arange(len(counts)), counts, width=1.0)
    axes.set(xlabel="delay (iterations)", ylabel="gradients", yscale="log" if delays else "linear")


def _timeline(axes: Axes, run: Run) -> None:
    """A bar per ticket from issue to application, by worker, coloured by delay, until `TIMELINE_TICKETS` are applied."""
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
    axes.set(xlabel="seconds", ylabel="worker", yticks=range(run.summary["num_workers"]), xlim=(0, end))
    axes.set_title("the first gradients, from ticket to update; the brighter, the later", fontsize="small")


if __name__ == "__main__":
    main()
