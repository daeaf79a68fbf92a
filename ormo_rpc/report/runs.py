"""Recorded runs, read back and grouped by everything but the seed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ormo_rpc.config.schema import GROUPS
from ormo_rpc.errors import ConfigError
from ormo_rpc.models.fingerprint import Fingerprint
from ormo_rpc.report.settings import MISSING, differing, identity, read_setting, shown
from ormo_rpc.storage.run_directory import TRACE, read_fingerprint, read_metrics, read_trace
from ormo_rpc.storage.summary import FILE, metrics_of, read_summary
from ormo_rpc.storage.sweep_directory import SweepDirectory
from ormo_rpc.tasks.metrics import TaskMetric, main_metric


@dataclass(frozen=True)
class Run:
    """A recorded run.

    Attributes:
        path: Its directory.
        summary: The content of ``summary.json``.
        metrics: The rows of ``metrics.jsonl``.
        events: The events of ``trace.jsonl``, without the header.
        setting: Its configuration by full key, but for the seed and what cannot change a result.
        seed: Its seed.
        smooth: The number of evaluations whose mean has to reach its targets.
        environment: The header of its trace: versions and machine.
        fingerprint: Its model's layout and the size of its data set; None where an earlier version did not write it.
    """

    path: Path
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]
    setting: dict[str, Any]
    seed: int
    smooth: int
    environment: dict[str, Any]
    fingerprint: Fingerprint | None

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read a run directory.

        Raises:
            ConfigError: it is not the directory of a run that has ended, or that of a replay, or has no ``config.yaml``.
        """
        summary = read_summary(path)
        if summary is None and (path / TRACE).is_file():
            raise ConfigError(f"{path}: got a run without a {FILE}: it is still running, or its process was killed")
        if summary is None or summary.get("iterations") is None:
            status = "" if summary is None or summary.get("status") is None else f" ({summary['status']}: {summary['reason']})"
            raise ConfigError(f"{path}: got a folder without the summary of a run that began{status}")
        if summary.get("replayed") is not None:
            raise ConfigError(f"{path}: got a replay, which is no run of its own, of {summary['replayed']}")
        header, events = read_trace(path)
        setting, seed, smooth = read_setting(path, header.get("resumed"))
        return cls(path, summary, read_metrics(path), events, setting, seed, smooth, header, read_fingerprint(path))

    @property
    def completed(self) -> bool:
        """Tell whether its figures count: it neither diverged nor was cut off."""
        return self.summary["status"] == "completed"

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

    def evaluated(self, key: str) -> tuple[list[float], list[float], list[float]]:
        """Return epochs, seconds and values of a metric such as ``test_accuracy`` in every evaluation."""
        rows = [row for row in self.metrics if row.get(key) is not None]
        return [row["epoch"] for row in rows], [row["seconds"] for row in rows], [row[key] for row in rows]

    @property
    def task_metrics(self) -> tuple[TaskMetric, ...]:
        """The metrics of its evaluations, the loss first."""
        return metrics_of(self.summary)

    @property
    def main_metric(self) -> TaskMetric:
        """The metric that its curve is of."""
        return main_metric(self.task_metrics)


@dataclass(frozen=True)
class Group:
    """Runs of one setting, each of another seed.

    Attributes:
        setting: Values by full key.
        runs: The runs, in the order of their seeds.
        repeated: Further runs of seeds that are in ``runs`` already; they count nowhere.
    """

    setting: dict[str, Any]
    runs: list[Run] = field(default_factory=list[Run])
    repeated: list[Run] = field(default_factory=list[Run])

    def label(self, keys: Sequence[str]) -> str:
        """Return the values of the keys in which groups differ; that of an option has its name before it."""
        words = [
            shown(self.setting[key]) if key in GROUPS else f"{key.rpartition('.')[2]} {shown(self.setting[key])}"
            for key in keys
            if key in self.setting
        ]
        return ", ".join(words) or shown(self.setting["algorithm"])

    def cell(self, key: str) -> str:
        """Return the value of a key for a table."""
        return shown(self.setting[key]) if key in self.setting else MISSING


def run_directories(paths: Iterable[Path]) -> list[Path]:
    """List the run directories among these paths and below them, each once; also those of runs that were killed, or run on.

    Raises:
        ConfigError: there is neither a run nor a job of a sweep below one of them.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        below = sorted({file.parent for name in (FILE, TRACE) for file in path.rglob(name)})
        if not below and not SweepDirectory(path).records():
            raise ConfigError(f"{path}: got a folder without any {FILE}, expected a run directory or a sweep of some")
        for each in below:
            found.setdefault(each.resolve(), each)
    return list(found.values())


def load_runs(paths: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """Load the runs among these paths and below them, and say why others cannot be compared.

    Raises:
        ConfigError: there is none that can be.
    """
    paths = list(paths)
    runs: list[Run] = []
    jobs = [job for path in paths for job in _jobs_without_run(path)]
    told = {folder.resolve() for folders, _ in jobs for folder in folders}
    refused = [reason for _, reason in jobs]
    directories = dict[Path, Path]()
    for path in paths:
        try:
            for each in run_directories([path]):
                directories.setdefault(each.resolve(), each)
        except ConfigError as error:
            refused.append(str(error))
    for resolved, path in directories.items():
        if resolved in told:
            continue
        try:
            runs.append(Run.load(path))
        except ConfigError as error:
            refused.append(str(error))
    if not runs:
        raise ConfigError("; ".join(refused))
    return runs, [f"Left out: {reason}" for reason in refused]


def _jobs_without_run(path: Path) -> Iterator[tuple[tuple[Path, ...], str]]:
    """Say which jobs of sweeps here and below have no summary, as those with a refused configuration: directories, reason."""
    for sweep in SweepDirectory.below(path):
        for job in sweep.records():
            folders = (Path(job.directory), sweep.path / Path(job.directory).name)  # the sweep may have been moved
            if not any((folder / FILE).is_file() for folder in folders):
                reason = "" if job.reason is None else f", {job.reason}"
                yield folders, f"job {job.number + 1} ({job.settings}): {job.status}{reason}"


def group_by_setting(runs: Iterable[Run]) -> list[Group]:
    """Group runs by setting, in the order of the values of the keys in which settings differ.

    Of runs with the same setting and seed the first one that completed counts, else the first one.
    """
    groups: dict[str, Group] = {}
    for run in sorted(runs, key=lambda run: (run.seed, not run.completed)):
        group = groups.setdefault(identity(run.setting), Group(run.setting))
        known = group.runs and group.runs[-1].seed == run.seed
        (group.repeated if known else group.runs).append(run)
    keys = differing_keys(list(groups.values()))
    return sorted(groups.values(), key=lambda group: [_rank(group.setting.get(key)) for key in keys])


def differing_keys(groups: Sequence[Group]) -> list[str]:
    """List the keys of the setting in which groups differ, the algorithm first."""
    return differing([group.setting for group in groups])


def _rank(value: Any) -> tuple[int, float, str]:
    """Sort numbers by size, before texts."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return 0, value, ""
    return 1, 0.0, "" if value is None else str(value)
