"""Recorded runs, read back and grouped by everything but the seed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ormo_rpc.errors import ConfigError
from ormo_rpc.storage.run_directory import read_metrics, read_trace
from ormo_rpc.storage.summary import read_summary

SETTING = ("algorithm", "scheduler", "num_workers", "heterogeneity", "dataset", "model", "runtime", "wire", "lr")
"""The keys of a summary that make up a setting."""


@dataclass(frozen=True)
class Run:
    """A recorded run.

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
            ConfigError: it is not the directory of a run that has ended.
        """
        summary = read_summary(path)
        if summary is None or summary.get("iterations") is None:
            raise ConfigError(f"{path}: got a folder without the summary of a run, expected a run directory or a sweep of some")
        return cls(path, summary, read_metrics(path), read_trace(path)[1])

    @property
    def batches_per_epoch(self) -> float:
        """Iterations in an epoch."""
        return self.summary["iterations"] / self.summary["epochs"]

    def of_kind(self, *kinds: str) -> list[dict[str, Any]]:
        """Return the events of some kinds, in order."""
        return [event for event in self.events if event["event"] in kinds]

    def losses(self) -> tuple[list[float], list[float], list[float]]:
        """Return epochs, seconds, and batch losses averaged over about the last 20 gradients."""
        epochs: list[float] = []
        seconds: list[float] = []
        averages: list[float] = []
        for event in self.of_kind("apply"):
            if event["loss"] is not None:
                former = averages[-1] if averages else event["loss"]
                averages.append(former + (event["loss"] - former) / 20)
                epochs.append((event["iteration"] + 1) / self.batches_per_epoch)
                seconds.append(event["seconds"])
        return epochs, seconds, averages

    def accuracies(self) -> tuple[list[float], list[float], list[float]]:
        """Return epochs, seconds and test accuracy of every evaluation."""
        rows = [row for row in self.metrics if row.get("test_accuracy") is not None]
        return [row["epoch"] for row in rows], [row["seconds"] for row in rows], [row["test_accuracy"] for row in rows]


@dataclass(frozen=True)
class Group:
    """Runs of one setting, which differ in the seed alone.

    Attributes:
        setting: The values of the keys `SETTING`.
        runs: The runs, in the order of their seeds.
    """

    setting: dict[str, Any]
    runs: list[Run]

    def label(self, keys: Sequence[str]) -> str:
        """Return the values of the keys in which groups differ."""
        return ", ".join(str(self.setting[key]) for key in keys) or str(self.setting["algorithm"])


def run_directories(paths: Iterable[Path]) -> list[Path]:
    """List the run directories among these paths and below them.

    Raises:
        ConfigError: there is none below one of them.
    """
    found: list[Path] = []
    for path in paths:
        below = sorted(file.parent for file in path.rglob("summary.json"))
        if not below:
            raise ConfigError(f"{path}: got a folder without any summary.json, expected a run directory or a sweep of some")
        found += below
    return found


def group_by_setting(runs: Iterable[Run]) -> list[Group]:
    """Group runs by setting, in the order of the settings."""
    groups: dict[str, Group] = {}
    for run in sorted(runs, key=lambda run: run.summary["seed"]):
        setting = {key: run.summary.get(key) for key in SETTING}
        groups.setdefault(json.dumps(setting), Group(setting, [])).runs.append(run)
    return [groups[key] for key in sorted(groups)]


def differing_keys(groups: Sequence[Group]) -> list[str]:
    """List the keys of the setting in which groups differ."""
    return [key for key in SETTING if len({json.dumps(each.setting[key]) for each in groups}) > 1]
