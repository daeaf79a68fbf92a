"""The progress bar: iteration, rate, time left, epoch, and the metrics that have a label for it, on one line of a terminal."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from tqdm import tqdm
from typing_extensions import override

from ormo_rpc.console import best_effort
from ormo_rpc.loggers.base import RunLog
from ormo_rpc.loggers.metrics import METRICS, metric_of
from ormo_rpc.loggers.statistics import Statistics
from ormo_rpc.tasks.metrics import TaskMetric, metric_named


class ProgressBar(RunLog):
    """A progress bar.

    Args:
        total_iterations: T, the iterations of the run.
        terminal: A file descriptor of the terminal.
        metric: Declares a metric of evaluations.
    """

    def __init__(self, total_iterations: int, terminal: int, metric: Callable[[str], TaskMetric] = metric_named) -> None:
        self._metric = metric
        self._file = best_effort(os.fdopen(os.dup(terminal), "w"))  # the terminal may be closed
        self._bar = tqdm(total=total_iterations, file=self._file, unit="it", dynamic_ncols=True)
        self._fields: dict[str, str] = {}

    @override
    def log(self, row: Mapping[str, Any], statistics: Statistics) -> None:
        if row["iteration"] >= self._bar.n:  # an evaluation comes later than the epoch that it is of
            self._fields["epoch"] = f"{row['epoch']:.1f}"
        self._fields |= {label: shown for key, value in row.items() for label, shown in [self._field(key, value)] if label}
        self._bar.set_postfix(self._fields, refresh=False)
        self._bar.update(max(0, row["iteration"] - self._bar.n))
        self._bar.refresh()

    def _field(self, key: str, value: Any) -> tuple[str, str]:
        """Label and value of a metric; the label is empty where it is not shown."""
        found = metric_of(key)
        if found is None:
            return (METRICS[key].bar, METRICS[key].shown(value)) if key in METRICS else ("", "")
        split, name = found
        metric = self._metric(name)
        return metric.bar and f"{'val ' * (split == 'val')}{metric.bar}", metric.shown(value)

    @override
    def finish(self, summary: Mapping[str, Any]) -> None:
        self._bar.close()  # leaves the last state on the terminal
        self._file.close()
