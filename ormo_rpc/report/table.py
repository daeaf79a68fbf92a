"""The table of a comparison: one row per setting, mean and spread over its seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ormo_rpc.report.runs import SETTING, Group

HEADER = (*SETTING, "seeds", "iterations", "train loss", "test accuracy", "seconds", "mean delay", "max delay", "diverged")


def rows(groups: Sequence[Group]) -> list[tuple[str, ...]]:
    """The header, and a row for each group; figures are of the runs that did not diverge, mean and standard deviation."""
    found: list[tuple[str, ...]] = [HEADER]
    for group in groups:
        whole = [run.summary for run in group.runs if run.summary["status"] != "diverged"]

        def column(name: str, form: str, whole: list[dict[str, float | None]] = whole) -> str:
            values = [value for summary in whole if (value := summary.get(name)) is not None]
            return spread(values, form)

        seconds = "virtual_seconds" if group.setting["runtime"] == "sim" else "wall_seconds"
        found.append(
            (
                *(str(group.setting[key]) for key in SETTING),
                str(len(group.runs)),
                column("iterations", ".0f"),
                column("train_loss", ".4f"),
                column("test_accuracy", ".2%"),
                column(seconds, ".1f"),
                column("delay_mean", ".1f"),
                column("delay_max", ".0f"),
                f"{len(group.runs) - len(whole)} of {len(group.runs)}",
            )
        )
    return found


def spread(values: Sequence[float], form: str) -> str:
    """Mean and sample standard deviation; the bare value where there is only one, or where all are equal."""
    if not values:
        return "-"
    mean = format(statistics.fmean(values), form)
    if len(values) == 1 or min(values) == max(values):
        return mean
    return f"{mean} ± {format(statistics.stdev(values), form)}"


def as_text(table: Sequence[Sequence[str]]) -> str:
    """Columns side by side, for a terminal."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join(lines)


def as_markdown(table: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    header, *body = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([header, "|" + "---|" * len(table[0]), *body])
