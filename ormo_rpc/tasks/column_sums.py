"""Sums over batches of what the coefficient of determination of each column is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.tasks.metrics import Sums


@dataclass(frozen=True, slots=True)
class ColumnSums(Sums):
    """Squared errors, and squared deviations of the targets from their mean, of each column.

    Of two batches ``spread = s + s' + (m' - m)^2 n n' / (n + n')`` (Chan, Golub, LeVeque 1983), which does not cancel where the
    mean is large, as ``sum y^2 - (sum y)^2 / n`` does. The batch with fewer columns, as ragged targets have them, has none of
    the others.

    Attributes:
        total: Sums of the squared errors, float64, shape (C,).
        count: Numbers that count, n, float64, shape (C,).
        mean_target: Means of the targets, m, float64, shape (C,); 0 where none counts.
        spread: Sums of the squared deviations, s, float64, shape (C,).
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
        predicted, targets, counted = (each.reshape(len(targets), -1) for each in (predicted, targets, counted))
        number = counted.double().sum(0)
        mean = torch.where(counted, targets, 0.0).sum(0) / number.clamp(min=1)
        error, deviation = (torch.where(counted, targets - each, 0.0) for each in (predicted, mean))
        return cls(error.square().sum(0), number, mean, deviation.square().sum(0))

    @override
    def __add__(self, other: Sums) -> ColumnSums:
        assert isinstance(other, ColumnSums), "of the same metric"
        width = max(len(self.total), len(other.total))
        mine, others = self._widened(width), other._widened(width)
        number = mine.count + others.count
        share = others.count / number.clamp(min=1)
        apart = others.mean_target - mine.mean_target
        return ColumnSums(
            total=mine.total + others.total,
            count=number,
            mean_target=mine.mean_target + share * apart,
            spread=mine.spread + others.spread + apart.square() * mine.count * share,
        )

    def _widened(self, width: int) -> ColumnSums:
        parts = (self.total, self.count, self.mean_target, self.spread)
        return ColumnSums(*(torch.nn.functional.pad(each, (0, width - len(each))) for each in parts))
