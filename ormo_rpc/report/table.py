"""The table of a comparison: one row per setting, with mean and spread over its seeds, and what is to be said around it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ormo_rpc.loggers.metrics import METRICS, SPLITS, key_of
from ormo_rpc.report.runs import Group, Run, differing_keys
from ormo_rpc.report.settings import MISSING, identity, shared, shown
from ormo_rpc.tasks.metrics import LOSS, TaskMetric

ENVIRONMENT = ("commit", "torch", "cpu", "capability")
"""Entries of a trace's header in which runs of one comparison should agree."""


BEST = "*"
"""Marks the best mean of a column, among settings of one task and data set."""
BEST_NOTE = f"{BEST} the best mean of its column"


@dataclass(frozen=True)
class Column:
    """The column of a metric.

    Attributes:
        heading: Its heading.
        key: The entry of the summary.
        form: The format of a value.
        higher_is_better: The direction in which a mean is better; None: none is marked.
        kind: Only of runs of this `_kind` that have the target; None: of all.
    """

    heading: str
    key: str
    form: str
    higher_is_better: bool | None = None
    kind: tuple[bool, str, int] | None = None


def columns(groups: Sequence[Group]) -> list[Column]:
    """List the columns of metrics: those of evaluations behind the training loss; their loss only where there is no other."""
    declared = [Column(metric.column, name, metric.form) for name, metric in METRICS.items() if metric.column]
    at = 1 + next(n for n, column in enumerate(declared) if column.key == "train_loss")
    metrics: dict[str, TaskMetric] = {}
    for run in (run for group in groups for run in group.runs):
        others = [metric for metric in run.task_metrics if metric.name != LOSS.name]
        for metric in others or [LOSS]:
            metrics.setdefault(metric.name, metric)
    evaluated = [
        Column(f"{split} {name}", key_of(split, name), metric.form, metric.higher_is_better)
        for name, metric in metrics.items()
        for split in SPLITS
    ]
    return [*declared[:at], *evaluated, *declared[at:], *_to_targets(groups)]


def _to_targets(groups: Sequence[Group]) -> list[Column]:
    """List the columns of the times at which targets (``evaluate.targets``) were reached, on the test split.

    Virtual seconds have columns of their own, and so have the means of each other number of evaluations (``evaluate.smooth``).
    """
    runs = [run for group in groups for run in group.runs]
    known = [run for run in runs if run.summary.get("target_metric") is not None]
    targets = {(*_kind(run), float(target)) for run in known for target in run.summary.get("seconds_to") or ()}
    return [
        Column(
            f"{'virtual ' * simulated}s to {name} {target:g}" + f", mean of {smooth}" * (smooth > 1),
            f"seconds_to/{target!r}",
            ".1f",
            kind=(simulated, name, smooth),
        )
        for simulated, name, smooth, target in sorted(targets, key=lambda each: (each[3], each[1], each[2], each[0]))
    ]


def _kind(run: Run) -> tuple[bool, str, int]:
    """Return if a run is simulated, the metric of its targets, and how many evaluations have to reach them."""
    return run.summary.get("runtime") == "sim", str(run.summary.get("target_metric")), run.smooth


def rows(groups: Sequence[Group]) -> list[tuple[str, ...]]:
    """Return the header and a row for each group: mean and standard deviation over the runs that completed.

    A column that no run has a value for is left out. The best mean of a metric of evaluations is marked (`BEST`).
    """
    keys, metrics = differing_keys(groups), columns(groups)
    seconds = ("virtual seconds", "seconds", "start and end")
    header = (*keys, "seeds", *(column.heading for column in metrics), *seconds, "diverged")
    marked = {(id(group), column.key) for column in metrics for group in _best(groups, column)}
    body = [(*(group.cell(key) for key in keys), *_figures(group, metrics, marked)) for group in groups]
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
        if any(run.summary.get("delay_within_round") for run in group.runs):
            said.append(
                f"{group.label(keys)}: delays are places within a round, whose gradients are all of the same parameters"
            )
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


def _completed(group: Group) -> list[dict[str, Any]]:
    return [run.summary for run in group.runs if run.completed]


def _of(column: Column, group: Group) -> list[dict[str, Any]]:
    """Return the summaries of the completed runs that a column is of; one that was not asked for its target did not miss it."""
    if column.kind is None:
        return _completed(group)
    entry, _, target = column.key.partition("/")
    runs = [run for run in group.runs if run.completed and _kind(run) == column.kind]
    return [run.summary for run in runs if target in (run.summary.get(entry) or ())]


def _best(groups: Sequence[Group], column: Column) -> Iterator[Group]:
    """Yield the groups with the best mean of a column, of each task and data set of which there are several."""
    if column.higher_is_better is None:
        return
    alike: dict[str, list[tuple[Group, float]]] = {}
    for group in groups:
        values = _values(_completed(group), column.key)
        if values:
            of = identity([group.setting.get("task"), group.setting.get("dataset")])
            alike.setdefault(of, []).append((group, statistics.fmean(values)))
    for found in alike.values():
        metric = TaskMetric(column.key, "", higher_is_better=_direction(found[0][0], column))
        if len(found) > 1:
            yield from (group for group, mean in found if not any(metric.is_better(other, mean) for _, other in found))


def _direction(group: Group, column: Column) -> bool:
    """Tell if higher is better in the task of a group; another task's metric of the same name may be better lower."""
    own = (metric for run in group.runs for metric in run.task_metrics)
    found = (each.higher_is_better for each in own if column.key in [key_of(split, each.name) for split in SPLITS])
    return next(found, bool(column.higher_is_better))


def _figures(group: Group, metrics: Sequence[Column], marked: Collection[tuple[int, str]]) -> tuple[str, ...]:
    """The cells of a group behind its setting."""
    completed, cells = _completed(group), list[str]()
    for column in metrics:
        summaries = _of(column, group)
        values = _values(summaries, column.key)
        mark = f" {BEST}" * ((id(group), column.key) in marked)
        cells.append(spread(values, column.form) + mark + _counted(values, summaries, completed))
    diverged = sum(run.summary["status"] == "diverged" for run in group.runs)
    simulated = group.setting.get("runtime") == "sim"
    # Earlier versions measured the time of training as wall_seconds.
    real = [{"seconds": each.get("training_seconds") or each.get("wall_seconds")} for each in completed if not simulated]
    others = [(each.get("start_seconds"), each.get("end_seconds")) for each in completed if not simulated]
    besides = [start + end for start, end in others if start is not None and end is not None]
    return (
        str(len(group.runs)),
        *cells,
        spread(_values(completed, "virtual_seconds"), ".1f"),
        spread(_values(real, "seconds"), ".1f"),
        spread(besides, ".1f") + _counted(besides, others, others),
        f"{diverged} of {len(group.runs)}",
    )


def _counted(values: Collection[float], runs: Collection[Any], completed: Collection[Any]) -> str:
    """Say how many of the runs that a cell is of have a value, where not all that completed have; empty where none has."""
    return f" ({len(values)} of {len(runs)})" if 0 < len(values) < len(completed) else ""


def _values(summaries: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """The values of an entry that runs have; of one of a mapping, ``entry/key``."""
    entry, _, key = name.partition("/")
    found = [
        summary[name] if name in summary else (summary.get(entry) or {}).get(key) if key else None for summary in summaries
    ]
    return [value for value in found if value is not None]


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
