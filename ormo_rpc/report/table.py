"""The table of a comparison: one row per setting, with mean and spread over its seeds, and what is to be said around it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from ormo_rpc.loggers.metrics import METRICS
from ormo_rpc.report.runs import Group, Run, differing_keys
from ormo_rpc.report.settings import MISSING, shared, shown

COLUMNS = {name: metric for name, metric in METRICS.items() if metric.column}
"""The metrics that have a column."""
ENVIRONMENT = ("commit", "torch", "cpu", "capability")
"""Entries of a trace's header in which runs of one comparison should agree."""


def rows(groups: Sequence[Group]) -> list[tuple[str, ...]]:
    """Return the header and a row for each group: mean and standard deviation over the runs that completed.

    A column that no run has a value for is left out.
    """
    keys = differing_keys(groups)
    seconds = ("virtual seconds", "seconds", "start and end")
    header = (*keys, "seeds", *(metric.column for metric in COLUMNS.values()), *seconds, "diverged")
    body = [(*(group.cell(key) for key in keys), *_figures(group)) for group in groups]
    kept = [n for n, column in enumerate(zip(*body, strict=True)) if set(column) != {MISSING}]
    return [tuple(row[n] for n in kept) for row in (header, *body)]


def in_common(groups: Sequence[Group]) -> str:
    """Say in one line what all runs agree in."""
    words = ", ".join(f"{key} {shown(value)}" for key, value in shared([group.setting for group in groups]).items())
    return f"All runs: {words}" if words else ""


def notes(groups: Sequence[Group]) -> list[str]:
    """Say what the table does not: seeds that occur twice, runs that do not count, ended early or differ in code or machine."""
    keys, said = differing_keys(groups), list[str]()
    for group in groups:
        for repeated in group.repeated:
            counted = next(run for run in group.runs if run.seed == repeated.seed)
            said.append(
                f"{group.label(keys)}: seed {repeated.seed} occurs twice: {counted.path} counts, {repeated.path} does not"
            )
        said += filter(None, [_no_seeds(group, keys)])
        for run in group.runs:
            if run.summary["status"] not in ("completed", "diverged"):
                said.append(f"{run.path}: {run.summary['status']} ({run.summary.get('reason')}), not in the means")
            elif lost := _lost(run.summary):
                said.append(f"{run.path}: {lost}, which the configuration does not tell")
        for status in ("completed", "diverged"):
            reasons = [
                run.summary["reason"] for run in group.runs if run.summary["status"] == status and run.summary.get("reason")
            ]
            if reasons:
                said.append(f"{group.label(keys)}: {len(reasons)} of {len(group.runs)} {status}: {reasons[0]}")
    runs = [run for group in groups for run in group.runs]
    return said + [note for entry in ENVIRONMENT if (note := _different(entry, runs))]


def _lost(summary: Mapping[str, Any]) -> str:
    """Say what a run lost on its way; empty where nothing was."""
    counts = {"workers evicted": len(summary.get("evictions") or ()), "updates rolled back": summary.get("rolled_back") or 0}
    return ", ".join(f"{what}: {count}" for what, count in counts.items() if count)


def _no_seeds(group: Group, keys: Sequence[str]) -> str:
    """Say that runs of one configuration have different models or data, as where the user's code was changed in between."""
    known = [(str(run.path), run.fingerprint) for run in group.runs if run.fingerprint is not None]
    for (first, mine), (other, others) in pairwise(known):
        difference = mine.difference_of_seeds(others, first, other)
        if difference is not None:
            return f"{group.label(keys)}: its runs are no seeds of one setting: {difference}"
    return ""


def _different(entry: str, runs: Sequence[Run]) -> str:
    counts = Counter(str(run.environment.get(entry)) for run in runs)
    values = ", ".join(f"{value} ({count} of {len(runs)} runs)" for value, count in counts.most_common())
    return f"Runs of different {entry}: {values}" if len(counts) > 1 else ""


def _figures(group: Group) -> tuple[str, ...]:
    """The cells of a group behind its setting."""
    completed = [run.summary for run in group.runs if run.completed]
    diverged = sum(run.summary["status"] == "diverged" for run in group.runs)
    simulated = group.setting.get("runtime") == "sim"
    # Earlier versions measured the time of training as wall_seconds.
    real = [{"seconds": each.get("training_seconds") or each.get("wall_seconds")} for each in completed if not simulated]
    others = [(each.get("start_seconds"), each.get("end_seconds")) for each in completed if not simulated]
    besides = [start + end for start, end in others if start is not None and end is not None]
    return (
        str(len(group.runs)),
        *(spread(_values(completed, name), metric.form) for name, metric in COLUMNS.items()),
        spread(_values(completed, "virtual_seconds"), ".1f"),
        spread(_values(real, "seconds"), ".1f"),
        spread(besides, ".1f"),
        f"{diverged} of {len(group.runs)}",
    )


def _values(summaries: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [summary[name] for summary in summaries if summary.get(name) is not None]


def spread(values: Sequence[float], form: str) -> str:
    """Format mean and sample standard deviation; the value alone where there is only one, or all are equal."""
    if not values:
        return MISSING
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
