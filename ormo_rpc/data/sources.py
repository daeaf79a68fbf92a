"""The contract of a data set, and images whose files torchvision knows: missing files, a download that happens once."""

from __future__ import annotations

import fcntl
from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from typing_extensions import override

from ormo_rpc.data.held_out import hold_out
from ormo_rpc.data.iterables import IterableSplit
from ormo_rpc.data.splits import ArraySplit, DataSet
from ormo_rpc.options import Part, option
from ormo_rpc.seeding import generator, seeded


@dataclass(frozen=True, kw_only=True)
class DataSource(Part, ABC):
    """A data set and its options."""

    PATH = "dataset"
    root: str = option("data", "folder that holds the files, one subfolder per data set", path=True)
    download: bool = option(False, "fetch missing files from the web, once per machine")
    verify: bool = option(True, "check md5 sums (CIFAR); off for a repackaged copy that you trust")
    validation: float = option(
        0.0,
        "training samples that are held out for val_loss and val_accuracy: a fraction in (0, 1), or their number",
        valid=lambda v: 0 <= v < 1 or (v >= 1 and float(v).is_integer()),
        expected="a fraction in [0, 1) or a whole number of samples",
    )

    @abstractmethod
    def load(self) -> DataSet:
        """Read the data set into this process's memory.

        Raises:
            ValueError: when it is missing or damaged; the message says what to do.
        """

    def prepare(self) -> None:
        """Do what is done once per machine before any process loads the data set, such as a download.

        Raises:
            ValueError: it cannot be done; the message says what to do.
        """

    def load_splits(self, seed: int) -> DataSet:
        """Load the data set, and hold out its validation split, which depends on the run's seed alone.

        What `load` draws from the global generators is the same in every process of every run.

        Raises:
            ValueError: as `load` does, or the validation split would leave no training sample.
        """
        with seeded(0, "data set", 0):
            data = self.load()
        if isinstance(data.train, IterableSplit):
            data.train.seed = seed
        return hold_out(data, self.validation, generator(seed, "validation", 0))

    @property
    def has_validation(self) -> bool:
        """True where there is a validation split, as far as is known before the data set is loaded."""
        return self.validation > 0

    def with_findings(self, data: DataSet) -> DataSource:  # noqa: ARG002 - there is nothing to find out by default
        """Return this part with what reading the whole data set has found out, which other processes need not do again."""
        return self


@dataclass(frozen=True, kw_only=True)
class TorchvisionImages(DataSource):
    """Images that torchvision can download; a subclass has the name of torchvision's class.

    The files are read without that class: it would unpickle whatever it finds, and it tells a missing file from a damaged one
    only in part.
    """

    MEAN: ClassVar[tuple[float, ...]]
    """Per channel, of the training pixels in [0, 1]."""
    STD: ClassVar[tuple[float, ...]]
    """Per channel, of the training pixels in [0, 1]."""
    NUM_CLASSES: ClassVar[int] = 10

    @property
    def torchvision_class(self) -> Any:
        """The class of the same name, imported where it is needed: the default data set works without torchvision."""
        import torchvision.datasets

        return getattr(torchvision.datasets, type(self).__name__)

    @property
    def root_folder(self) -> Path:
        """The root as an absolute path."""
        return Path(self.root).expanduser().resolve()

    @property
    @abstractmethod
    def folder(self) -> Path:
        """The folder of the files."""

    @abstractmethod
    def md5_sums(self) -> dict[str, str | None]:
        """The name of every file and the md5 sum to check, None where there is none."""

    @abstractmethod
    def fetch(self) -> None:
        """Download and unpack all files."""

    @abstractmethod
    def read(self, *, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Images, uint8 of shape (N, C, H, W), and labels, int64 of shape (N,); raises anything on damaged files."""

    @override
    def prepare(self) -> None:
        if self.download:
            self._fetch()

    @override
    def load(self) -> DataSet:
        return self._load(augment=False)

    def _load(self, *, augment: bool) -> DataSet:
        self._check()
        train = self._split(train=True, augment=augment)
        test = self._split(train=False, augment=False)
        return DataSet(train, test, tuple(train.images.shape[1:]), self.NUM_CLASSES)

    def _missing(self) -> list[str]:
        return [name for name in self.md5_sums() if not (self.folder / name).is_file()]

    def _fetch(self) -> None:
        try:
            # Looking before the lock is held could see files that another run is just unpacking.
            with _locked(self.root_folder):
                if self._missing():
                    self.fetch()
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"dataset.download: {type(self).__name__} cannot be fetched: {error}; put the files into {self.folder} by hand"
            ) from error

    def _check(self) -> None:
        from torchvision.datasets.utils import check_integrity

        if missing := self._missing():
            raise ValueError(
                f"dataset.root: {type(self).__name__} is not in {self.folder}: {missing[0]} is missing; "
                f"set dataset.root=... to the folder that has {self.folder.relative_to(self.root_folder)} in it, "
                "or dataset.download=true to fetch it"
            )
        for name, md5 in self.md5_sums().items():
            if self.verify and md5 is not None and not check_integrity(self.folder / name, md5):
                raise ValueError(
                    f"dataset.root: {self.folder / name} is not the original file: its md5 sum is not {md5}; "
                    "delete it and fetch it again, or set dataset.verify=false if it is a repackaged copy that you trust"
                )

    def _split(self, *, train: bool, augment: bool) -> ArraySplit:
        try:
            images, labels = self.read(train=train)
            if images.dtype != torch.uint8:
                raise ValueError(f"pixels of type {images.dtype}, expected bytes")
            if len(images) != len(labels):
                raise ValueError(f"{len(images)} images, but {len(labels)} labels")
            if not 0 <= int(labels.min()) <= int(labels.max()) < self.NUM_CLASSES:
                raise ValueError(f"labels outside of 0 to {self.NUM_CLASSES - 1}")
        except Exception as error:  # a damaged file can make a parser raise anything
            raise ValueError(
                f"dataset.root: {self.folder} cannot be read as {type(self).__name__}: {type(error).__name__}: {error}"
            ) from error
        return ArraySplit(images, labels.to(torch.int64), scale=255, mean=self.MEAN, std=self.STD, augment=augment)


@contextmanager
def _locked(folder: Path) -> Generator[None]:
    """Hold the folder's lock, which ends with the process at the latest; wait while another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".download.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
