"""The table of a comparison: one row per setting, with mean and spread over its seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ormo_rpc.loggers.metrics import METRICS
from ormo_rpc.report.runs import SETTING, Group

COLUMNS = {name: metric for name, metric in METRICS.items() if metric.column}
"""The metrics that have a column."""
HEADER = (*SETTING, "seeds", *(metric.column for metric in COLUMNS.values()), "seconds", "diverged")


def rows(groups: Sequence[Group]) -> list[tuple[str, ...]]:
    """Return the header and a row for each group: mean and standard deviation over the runs that did not diverge."""
    found: list[tuple[str, ...]] = [HEADER]
    for group in groups:
        finished = [run.summary for run in group.runs if run.summary["status"] != "diverged"]
        seconds = "virtual_seconds" if group.setting["runtime"] == "sim" else "wall_seconds"
        found.append(
            (
                *(str(group.setting[key]) for key in SETTING),
                str(len(group.runs)),
                *(spread(_values(finished, name), metric.form) for name, metric in COLUMNS.items()),
                spread(_values(finished, seconds), ".1f"),
                f"{len(group.runs) - len(finished)} of {len(group.runs)}",
            )
        )
    return found


def _values(summaries: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [summary[name] for summary in summaries if summary.get(name) is not None]


def spread(values: Sequence[float], form: str) -> str:
    """Format mean and sample standard deviation; the value alone where there is only one, or all are equal."""
    if not values:
        return "-"
    mean = format(statistics.fmean(values), form)
    if len(values) == 1 or min(values) == max(values):
        return mean
    return f"{mean} ± {format(statistics.stdev(values), form)}"


def as_text(table: Sequence[Sequence[str]]) -> str:
    """Align the columns of a table, for a terminal."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join(lines)


def as_markdown(table: Sequence[Sequence[str]]) -> str:
    """Format a table in Markdown."""
    header, *body = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([header, "|" + "---|" * len(table[0]), *body])
