"""Handwritten digits that come with scikit-learn: the default, because nothing has to be downloaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.data.sources import DataSource
from ormo_rpc.data.splits import ArraySplit, DataSet
from ormo_rpc.options import register

TEST_SIZE = 360


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
        # Imported here: it takes a second, and no other data set needs it.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        scans, labels = load_digits(return_X_y=True)
        parts = train_test_split(scans, labels, test_size=TEST_SIZE, random_state=0, stratify=labels)
        train_x, test_x, train_y, test_y = (torch.as_tensor(part) for part in parts)
        train, test = (
            ArraySplit(x.reshape(-1, 1, 8, 8).to(torch.uint8), y.to(torch.int64), scale=16, mean=(0.3053,), std=(0.3760,))
            for x, y in ((train_x, train_y), (test_x, test_y))
        )
        return DataSet(train, test, (1, 8, 8), 10)

    @override
    def prepare(self) -> None:
        pass  # the scans are part of the scikit-learn package
