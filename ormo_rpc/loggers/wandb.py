"""Weights & Biases: metrics over iterations, with the delays of each worker and their histogram."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from typing_extensions import override

from ormo_rpc.loggers.base import Logger, RunInfo, RunLog
from ormo_rpc.loggers.statistics import Statistics
from ormo_rpc.options import option, register


class WandbMode(Enum):
    """The place where Weights & Biases keeps the run."""

    offline = "offline"
    """In the run directory; ``wandb sync`` uploads it."""
    online = "online"


@register("wandb")
@dataclass(frozen=True, kw_only=True)
class WandbLogger(Logger):
    """Log to Weights & Biases, offline by default."""

    mode: WandbMode = option(WandbMode.offline, "offline (kept in the run directory) or online")
    project: str = option("ormo_rpc", "wandb project")
    run_name: str | None = option(None, "wandb run name; by default algorithm, scheduler, workers and seed")
    group: str | None = option(None, "wandb group")

    @override
    def start(self, run: RunInfo) -> RunLog:
        import wandb  # takes a second to load, so only where it is used

        try:
            started = wandb.init(
                project=self.project,
                name=self.run_name or run.name,
                group=self.group,
                mode=self.mode.value,
                dir=run.directory,
                config=dict(run.config),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            raise ValueError(
                f"logger.mode: wandb cannot start {self.mode.value}: {error}; use logger.mode=offline or logger=none"
            ) from None
        started.define_metric("*", step_metric="iteration")
        return WandbRunLog(started, wandb.Histogram)


class WandbRunLog(RunLog):
    """A run of Weights & Biases.

    Args:
        run: As ``wandb.init`` returns it.
        histogram: The class ``wandb.Histogram``.
    """

    def __init__(self, run: Any, histogram: Any) -> None:
        self.run = run
        self.histogram = histogram

    @override
    def log(self, row: Mapping[str, Any], statistics: Statistics) -> None:
        pushes = statistics.pushes_per_worker
        per_worker = {f"delay/worker_{w}": statistics.delay_sum_per_worker[w] / n for w, n in sorted(pushes.items())}
        with_histogram = "test_accuracy" in row and statistics.applied > 0  # large, so with evaluations only
        delays = {"delay/histogram": self._histogram(statistics.delay_counts())} if with_histogram else {}
        self.run.log({**row, **per_worker, **delays})

    @override
    def finish(self, summary: Mapping[str, Any]) -> None:
        self.run.summary.update(dict(summary))
        self.run.finish()

    def _histogram(self, counts: list[int]) -> Any:
        """Make a histogram of delays 0, 1, ..., with bins as wide as wandb's limit on their number asks for."""
        width = -(-len(counts) // self.histogram.MAX_LENGTH)
        padded = np.pad(counts, (0, -len(counts) % width)).reshape(-1, width).sum(1)
        return self.histogram(np_histogram=(padded, np.arange(len(padded) + 1) * width))
