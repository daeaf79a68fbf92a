"""Data sets for tests of the start of processes: a large one, one that reads from an open file, and one with a thread."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from ormo_rpc.data import ArraySplit, DataSet

BYTES = 128 << 20
"""The memory of the training inputs of `data`, far more than that of one process's own pages."""
_SIDE = 32


def data(size: int = BYTES // (3 * _SIDE * _SIDE)) -> DataSet:
    """Images of ones, so that they fill memory of their own."""
    images, labels = torch.ones(size, 3, _SIDE, _SIDE, dtype=torch.uint8), torch.arange(size) % 10
    split = ArraySplit(images, labels, scale=255, mean=(0.0,) * 3, std=(1.0,) * 3)
    few = ArraySplit(images[:10].clone(), labels[:10].clone(), scale=255, mean=(0.0,) * 3, std=(1.0,) * 3)
    return DataSet(split, few, (3, _SIDE, _SIDE), 10)


class FileItems:
    """Map-style items that are read from an open file."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as this
        self.file.write(bytes(10 * 64))
        self.classes = range(10)

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.file.seek(index * 64)
        return torch.frombuffer(bytearray(self.file.read(64)), dtype=torch.uint8).view(1, 8, 8).float(), index


def from_open_file() -> Sequence[FileItems]:
    """A pair that shares an open file."""
    items = FileItems()
    return items, items


def with_thread() -> DataSet:
    """A small data set whose maker leaves a thread running."""
    threading.Thread(target=threading.Event().wait, name="of the data", daemon=True).start()
    return data(20)
