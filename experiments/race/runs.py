"""One simulated run of the race, and the folder of those that have finished."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import torch
from typing_extensions import override

from experiments.common import QUIET, write_results
from experiments.race.versions import run_version
from ormo_rpc.composing import compose
from ormo_rpc.config.schema import Config
from ormo_rpc.data import DataSet
from ormo_rpc.data.held_out import PurePartSplit, part_of
from ormo_rpc.data.sources import DataSource
from ormo_rpc.data.splits import ArraySplit, Split
from ormo_rpc.errors import ConfigError
from ormo_rpc.runtimes import simulator
from ormo_rpc.runtimes.configured import configured_evaluator
from ormo_rpc.runtimes.job import Job
from ormo_rpc.runtimes.temporary import temporary_folder
from ormo_rpc.storage.environment import arithmetic
from ormo_rpc.storage.run_directory import read_metrics
from ormo_rpc.worker.evaluation import Evaluator


@dataclass(frozen=True, kw_only=True)
class Record:
    """The figures of a run that are kept.

    Attributes:
        status: ``completed`` or ``diverged``.
        iterations: Tickets that were applied at each evaluation.
        seconds: Virtual time of each evaluation.
        accuracy: The accuracy on the split of the run, at each evaluation.
        cpu_seconds: Processor time that the run took.
        machine: The torch and the processor that it was made with, and how its passes differ from plain float32.
    """

    status: str
    iterations: list[int]
    seconds: list[float]
    accuracy: list[float]
    cpu_seconds: float
    machine: str = ""

    def last(self, smooth: int) -> float:
        """The mean of the last evaluations; 0 for a run that diverged or ended before the first."""
        found = [each for each in self.accuracy[-smooth:] if each == each]
        return sum(found) / len(found) if found and self.status == "completed" else 0.0

    def time_to(self, target: float, smooth: int) -> float | None:
        """The time at which the accuracy reaches a target, see `time_to`; None for a run that diverged, too."""
        return time_to(self.seconds, self.accuracy, target, smooth) if self.status == "completed" else None


def time_to(seconds: Sequence[float], values: Sequence[float], target: float, smooth: int) -> float | None:
    """The first of these times at which the mean of so many values in a row reaches a target; None: never."""
    for end in range(smooth, len(values) + 1):
        if sum(values[end - smooth : end]) / smooth >= target:
            return seconds[end - 1]
    return None


class Missing(Exception):
    """A run has not been made, and must not be made now."""


class Store:
    """Finished runs, one file each, by what determines them.

    Args:
        folder: Where they are.
        root: The folder of the data sets; None: nothing is run, and what is missing raises `Missing`.
        until: Time on the monotonic clock after which no run is begun.
        most: Samples of the validation split that are evaluated, at most; None for all.
        more: Overrides that do not matter for the results.
    """

    def __init__(
        self,
        folder: Path,
        root: str | None,
        until: float = float("inf"),
        *,
        most: int | None = None,
        more: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        self.root = root
        self.until = until
        self.most = most
        self.more = more
        self.made = 0
        """Runs that were made by this object."""

    def run(self, overrides: Sequence[str], split: str) -> Record:
        """Return a run's record; run it where there is none yet.

        Args:
            overrides: Of the run, without the folder of the data.
            split: What is evaluated: ``test`` or ``validation``.

        Raises:
            Missing: it must not be run now.
        """
        key = {
            "overrides": [*overrides],
            "split": split,
            "version": run_version(overrides),
            **({} if self.most is None else {"most": self.most}),
        }
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
        file = self.folder / f"{name}.json"
        if (former := finished(file)) is not None:
            return _told(former, overrides)
        if self.root is None or time.monotonic() > self.until:
            raise Missing(" ".join(overrides))
        record = self.simulate((*overrides, f"dataset.root={self.root}", *self.more), split)
        self.made += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        write_results(file, json.dumps({"key": key, "record": asdict(record)}))
        return _told(record, overrides)

    def simulate(self, overrides: Sequence[str], split: str) -> Record:
        """Make a run.

        Raises:
            ConfigError: the data cannot be read.
        """
        return simulate(overrides, split, self.most)


def _told(record: Record, overrides: Sequence[str]) -> Record:
    """A record of the store, which has the machine alone, with how its passes differ from plain float32."""
    words = passes(overrides) if record.machine else []
    return dataclasses.replace(record, machine=", ".join([record.machine, *words]))


def finished(file: Path) -> Record | None:
    """The record of a finished run; None where there is none, or only what a machine's crash has left of it."""
    try:
        return Record(**json.loads(file.read_text())["record"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def simulate(overrides: Sequence[str], split: str, most: int | None = None) -> Record:
    """Simulate a run, evaluated on one split alone.

    Args:
        overrides: Of the run.
        split: ``test`` or ``validation``.
        most: Samples of the validation split, at most; None for all.

    Raises:
        ConfigError: the data cannot be read.
    """
    config = compose((*QUIET, *overrides))
    try:
        job = OneSplitJob(config, split, most)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    began = time.process_time()
    with temporary_folder("race") as folder:
        run_dir = folder / "run"
        summary = simulator.run(config, run_dir, time.monotonic(), job)
        rows = [row for row in read_metrics(run_dir) if row.get("test_accuracy") is not None]
    return Record(
        status=summary["status"],
        iterations=[row["iteration"] for row in rows],
        seconds=[row["seconds"] for row in rows],
        accuracy=[row["test_accuracy"] for row in rows],
        cpu_seconds=time.process_time() - began,
        machine=machine(job.device(0)),
    )


def machine(device: torch.device) -> str:
    """Torch, and the processor or the GPU of workers, in words."""
    here = arithmetic()
    return f"torch {here['torch']}, {here['cpu'] if device.type == 'cpu' else torch.cuda.get_device_name(device)}"


def passes(overrides: Sequence[str]) -> list[str]:
    """The differences of passes from plain float32, autocast and the compiler, in words."""
    found = (each.removeprefix("worker.").partition("=") for each in overrides)
    return [f"{key} {value}" for key, _, value in found if key in ("autocast", "compile")]


class OneSplitJob(Job):
    """A job whose images are read once for all runs, and whose evaluations cover one split.

    Args:
        config: The configuration.
        split: ``test`` or ``validation``; its metrics are those of the job's test split.
        most: Samples of the validation split, at most; None for all.
    """

    def __init__(self, config: Config, split: str, most: int | None = None) -> None:
        super().__init__(config)
        data, whole = self.data, kept(dataclasses.replace(config.dataset, validation=0.0), self.device(0))
        assert isinstance(data.train, PurePartSplit), "some samples are held out"
        assert isinstance(data.validation, PurePartSplit), "some samples are held out"
        parts: dict[str, Split] = {
            "test": whole["test"],
            "validation": part_of(whole["train"], data.validation.indices[:most], augment=False),
        }
        train = part_of(whole["train"], data.train.indices, augment=True)
        self.data = DataSet(train, parts[split], data.input_shape, data.num_classes)

    @override
    def evaluator(self) -> Evaluator | None:
        return configured_evaluator(self.config, self.model(), self.data)


class NormalisedSplit:
    """The images of an `ArraySplit` as it would make them, made once."""

    PURE: ClassVar[bool] = True

    def __init__(self, split: ArraySplit) -> None:
        assert not split.augment, "augmented images are new each time"
        self.images, self.labels = split.batch(torch.arange(len(split)), None)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: torch.Tensor, generator: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ARG002 - of augmentation, of which there is none
        """The images and labels of these numbers."""
        return self.images[indices], self.labels[indices]


@functools.lru_cache(maxsize=2)
def kept(dataset: DataSource, device: torch.device) -> Mapping[str, Split]:
    """The training and test images of a data set, where workers compute; the last two are kept.

    On the CPU they are normalised once, unless they are augmented.
    """
    data = dataset.load()
    found: dict[str, Split] = {}
    for name, split in (("train", data.train), ("test", data.test)):
        assert isinstance(split, ArraySplit), "images in memory"
        found[name] = NormalisedSplit(split) if device.type == "cpu" and not split.augment else split.to(device)
    return found
