"""Small data sets: random images, a user's noisy dataset, and CIFAR-10's files with four images each."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset


def images(count: int, channels: int, size: int) -> Tensor:
    return torch.randint(1, 256, (count, channels, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))


class Noisy(Dataset[tuple[Tensor, int]]):
    """A user's dataset that augments with torch's global generator."""

    def __init__(self, size: int = 6) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((2, 3), float(index)) + torch.rand(()), index % 4


CIFAR10_FILES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def write_cifar10(root: Path, protocol: int = 4) -> dict[str, Tensor]:
    """Six pickles of four images each; the labels of file number f are f, ..., f + 3."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    written: dict[str, Tensor] = {}
    for number, name in enumerate(CIFAR10_FILES):
        written[name] = images(4, 3, 32).roll(number, 0)
        batch = {"data": written[name].reshape(4, 3072).numpy(), "labels": [number + place for place in range(4)]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=protocol))
    return written
