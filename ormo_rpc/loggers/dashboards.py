"""Where a run can be watched: a progress bar on the terminal, and Weights & Biases."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ormo_rpc.config.saving import to_tree
from ormo_rpc.config.schema import Config, WandbMode
from ormo_rpc.runtimes.recorder import Dashboard
from ormo_rpc.server.events import Statistics


class ProgressBar:
    """Iteration, rate, time left, epoch, loss, accuracy and mean delay on one line of a terminal.

    Args:
        total: T, the iterations of the run.
        initial: The iteration at which it starts.
        terminal: A file descriptor of the terminal.
    """

    def __init__(self, total: int, initial: int, terminal: int) -> None:
        self.file = os.fdopen(os.dup(terminal), "w")
        self.bar = tqdm(total=total, initial=initial, file=self.file, unit="it", dynamic_ncols=True)
        self.fields: dict[str, str] = {}

    def show(self, row: Mapping[str, Any], statistics: Statistics) -> None:
        """Move the bar."""
        if "test_accuracy" not in row:  # an evaluation comes later than the epoch that it is of
            self.fields["epoch"] = f"{row['epoch']:.1f}"
        if row.get("train_loss") is not None:
            self.fields["loss"] = f"{row['train_loss']:.4f}"
        if "test_accuracy" in row:
            self.fields["accuracy"] = f"{row['test_accuracy']:.2%}"
        self.fields["delay"] = f"{statistics.delay_mean:.1f}"
        self.bar.set_postfix(self.fields, refresh=False)
        self.bar.update(max(0, statistics.iterations - self.bar.n))
        with contextlib.suppress(OSError):  # the terminal may be gone
            self.bar.refresh()

    def close(self, summary: Mapping[str, Any]) -> None:  # noqa: ARG002 - the launcher prints it
        """Leave the last state standing."""
        with contextlib.suppress(OSError):  # the terminal may be gone
            self.bar.close()
            self.file.close()


class Wandb:
    """Weights & Biases: loss, learning rate, delays, throughput, lock times and accuracy by iteration, epoch and second.

    Args:
        config: The configuration, which is stored with the run.
        directory: Where the local files go, into ``wandb/``.

    Raises:
        ValueError: it cannot start, for example online without being logged in.
    """

    def __init__(self, config: Config, directory: Path) -> None:
        import wandb  # a second to load, and of no use when it is disabled

        self.wandb = wandb
        name = f"{config.algorithm.name}-{config.scheduler.name}-{config.num_workers}w-seed{config.seed}"
        try:
            self.run = wandb.init(
                project=config.logger.project,
                name=config.logger.run_name or name,
                group=config.logger.group,
                mode=config.logger.mode.value,
                dir=directory,
                config=to_tree(config),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            raise ValueError(
                f"logger.mode: wandb cannot start {config.logger.mode.value}: {error}; use logger.mode=offline"
            ) from None
        self.run.define_metric("*", step_metric="iteration")

    def show(self, row: Mapping[str, Any], statistics: Statistics) -> None:
        """Log a row, with each worker's mean delay and the histogram of all delays."""
        pushes = statistics.pushes_per_worker
        per_worker = {f"delay/worker_{w}": statistics.delay_sum_per_worker[w] / n for w, n in sorted(pushes.items())}
        counts = statistics.delay_counts() if "test_accuracy" in row and statistics.delays else None
        histogram = {} if counts is None else {"delay/histogram": self._histogram(counts)}
        self.run.log({**row, **per_worker, **histogram})

    def close(self, summary: Mapping[str, Any]) -> None:
        """Store the summary and finish the run."""
        self.run.summary.update(plain(dict(summary)))
        self.run.finish()

    def _histogram(self, counts: list[int]) -> Any:
        most = self.wandb.Histogram.MAX_LENGTH
        width = -(-len(counts) // most)
        padded = np.pad(counts, (0, -len(counts) % width)).reshape(-1, width).sum(1)
        return self.wandb.Histogram(np_histogram=(padded, np.arange(len(padded) + 1) * width))


def dashboards(config: Config, directory: Path, total: int, terminal: int | None) -> list[Dashboard]:
    """The dashboards that a configuration asks for; the bar only where there is a terminal."""
    shown: list[Dashboard] = []
    if config.logger.mode is not WandbMode.disabled:
        shown.append(Wandb(config, directory))
    if config.logger.progress and terminal is not None:
        shown.append(ProgressBar(total, 0, terminal))
    return shown


def plain(value: Any) -> Any:
    """The value with enumerations replaced by what they stand for, all the way down."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return value
