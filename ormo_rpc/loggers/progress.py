"""The progress bar: iteration, rate, time left, epoch, and the metrics that have a label for it, on one line of a terminal."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm
from typing_extensions import override

from ormo_rpc.console import best_effort
from ormo_rpc.loggers.base import RunLog
from ormo_rpc.loggers.metrics import METRICS
from ormo_rpc.loggers.statistics import Statistics


class ProgressBar(RunLog):
    """A progress bar.

    Args:
        total_iterations: T, the iterations of the run.
        terminal: A file descriptor of the terminal.
    """

    def __init__(self, total_iterations: int, terminal: int) -> None:
        self._file = best_effort(os.fdopen(os.dup(terminal), "w"))  # the terminal may be closed
        self._bar = tqdm(total=total_iterations, file=self._file, unit="it", dynamic_ncols=True)
        self._fields: dict[str, str] = {}

    @override
    def log(self, row: Mapping[str, Any], statistics: Statistics) -> None:
        if row["iteration"] >= self._bar.n:  # an evaluation comes later than the epoch that it is of
            self._fields["epoch"] = f"{row['epoch']:.1f}"
        self._fields |= {
            METRICS[name].bar: METRICS[name].shown(row[name]) for name in METRICS if METRICS[name].bar and name in row
        }
        self._bar.set_postfix(self._fields, refresh=False)
        self._bar.update(max(0, row["iteration"] - self._bar.n))
        self._bar.refresh()

    @override
    def finish(self, summary: Mapping[str, Any]) -> None:
        self._bar.close()  # leaves the last state on the terminal
        self._file.close()
