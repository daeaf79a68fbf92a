"""Sums over batches of what the coefficient of determination of each column is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.tasks.metrics import Sums


@dataclass(frozen=True, slots=True)
class ColumnSums(Sums):
    """Squared errors, and squared deviations of the targets from their mean, of each column: each place of a sample's targets.

    Of two batches ``spread = s + s' + (m' - m)^2 n n' / (n + n')`` (Chan, Golub, LeVeque 1983), which does not cancel where the
    mean is large, as ``sum y^2 - (sum y)^2 / n`` does. A batch whose targets are smaller, as ragged ones may be, has none of
    the other places.

    Attributes:
        total: Sums of the squared errors, float64, of the shape of a sample's targets, or (1,).
        count: Numbers that count, n, float64, of the same shape.
        mean_target: Means of the targets, m, float64, of the same shape; 0 where none counts.
        spread: Sums of the squared deviations, s, float64, of the same shape.
    """

    total: torch.Tensor
    count: torch.Tensor
    mean_target: torch.Tensor
    spread: torch.Tensor

    @classmethod
    def of(cls, predicted: torch.Tensor, targets: torch.Tensor, counted: torch.Tensor) -> ColumnSums:
        """The sums of a batch.

        Args:
            predicted: Predictions, float64, shape (N, ...).
            targets: Targets, of the same shape and dtype.
            counted: Which of them count, bool, of the same shape.
        """
        shape = (len(targets), *(targets.shape[1:] or (1,)))
        predicted, targets, counted = (each.reshape(shape) for each in (predicted, targets, counted))
        number = counted.double().sum(0)
        mean = torch.where(counted, targets, 0.0).sum(0) / number.clamp(min=1)
        error, deviation = (torch.where(counted, targets - each, 0.0) for each in (predicted, mean))
        return cls(error.square().sum(0), number, mean, deviation.square().sum(0))

    @override
    def __add__(self, other: Sums) -> ColumnSums:
        assert isinstance(other, ColumnSums), "of the same metric"
        shape = [*map(max, zip(self.total.shape, other.total.shape, strict=True))]
        mine, others = self._widened(shape), other._widened(shape)
        number = mine.count + others.count
        share = others.count / number.clamp(min=1)
        apart = others.mean_target - mine.mean_target
        return ColumnSums(
            total=mine.total + others.total,
            count=number,
            mean_target=mine.mean_target + share * apart,
            spread=mine.spread + others.spread + apart.square() * mine.count * share,
        )

    def _widened(self, shape: Sequence[int]) -> ColumnSums:
        added = [size - now for size, now in zip(shape, self.total.shape, strict=True)]
        pad = [each for number in reversed(added) for each in (0, number)]
        parts = (self.total, self.count, self.mean_target, self.spread)
        return ColumnSums(*(torch.nn.functional.pad(each, pad) for each in parts))
