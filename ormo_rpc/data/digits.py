"""Handwritten digits that come with scikit-learn: the default, because nothing has to be downloaded."""

from __future__ import annotations

import gzip
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from typing_extensions import override

from ormo_rpc.data.sources import DataSource
from ormo_rpc.data.splits import ArraySplit, DataSet
from ormo_rpc.options import register

TEST_SIZE = 360
ORDER = Path(__file__).with_name("digits_order.npy")
"""Places of the scans for training, then of those for testing; the division is a file so that no library can change it.

Made by scikit-learn's ``train_test_split(..., test_size=360, random_state=0, stratify=labels)``.
"""
SCANS = "datasets/data/digits.csv.gz"
"""In the package of scikit-learn."""


@register("digits")
@dataclass(frozen=True, kw_only=True)
class Digits(DataSource):
    """1,797 handwritten digits of 8x8 pixels in ten classes, part of scikit-learn.

    The set has no official halves: 360 scans are set aside for testing and 1,437 left for training, with equal shares of every
    class. The division is always the same, whatever the run's seed, so that accuracies can be compared.

    Source: Alpaydin and Kaynak 1998, the test half of UCI "Optical Recognition of Handwritten Digits".
    """

    @override
    def load(self) -> DataSet:
        order = torch.from_numpy(np.load(ORDER).astype(np.int64))
        train, test = (
            ArraySplit(
                rows[:, :-1].reshape(-1, 1, 8, 8).contiguous(),
                rows[:, -1].to(torch.int64),
                scale=16,
                mean=(0.3053,),
                std=(0.3760,),
            )
            for rows in _table()[order].split([len(order) - TEST_SIZE, TEST_SIZE])
        )
        return DataSet(train, test, (1, 8, 8), 10)


def _table() -> torch.Tensor:
    """One row a scan: its pixels, and what it shows."""
    package = importlib.util.find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    file = Path(package.origin).parent / SCANS
    if file.is_file():  # importing scikit-learn takes half as long as importing PyTorch, in every process of a run
        with gzip.open(file, "rt") as lines:
            return torch.from_numpy(np.loadtxt(lines, delimiter=",", dtype=np.uint8))
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    return torch.as_tensor(np.column_stack([scans, labels])).to(torch.uint8)
