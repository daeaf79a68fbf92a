"""Regression: one or more numbers for each sample."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from typing_extensions import override

from ormo_rpc.data import DataSet
from ormo_rpc.data.padding import IGNORED
from ormo_rpc.options import option, positive, register
from ormo_rpc.seeding import seeded
from ormo_rpc.tasks.base import Task, UnfitTargets
from ormo_rpc.tasks.batches import logits_of
from ormo_rpc.tasks.column_sums import ColumnSums
from ormo_rpc.tasks.metrics import LOSS, Sums, TaskMetric

CONSTANT = 1e-13
"""Standard deviation, relative to the mean, up to which a column is constant: that of rounding in float64."""


class ErrorKind(Enum):
    """The loss of one number."""

    mse = "mse"
    l1 = "l1"
    huber = "huber"


@register("regression")
@dataclass(frozen=True, kw_only=True)
class Regression(Task):
    """The error of predicted numbers: an output and targets of the same shape (N, ...), or (N, 1) and (N,).

    All means are over single numbers. ``r2`` is ``1 - sum (y - p)^2 / sum (y - mean y)^2`` of each column, and their mean; as
    in scikit-learn the mean is that of the split itself. Unlike there, columns that are constant are left out: it counts them
    as 0 or 1. Metrics are computed in float64.
    """

    error: ErrorKind = option(ErrorKind.mse, "mse (squared error), l1 (absolute error) or huber")
    delta: float = option(
        1.0, "error at which huber turns from squared to linear", valid=positive, expected="a finite number > 0"
    )
    ignore_nan: bool = option(False, "targets that are NaN are missing or padding, and do not count")

    @override
    def metrics(self) -> tuple[TaskMetric, ...]:
        return (
            LOSS,
            TaskMetric("mae", "mean absolute error", higher_is_better=False),
            TaskMetric("rmse", "root of the mean squared error", higher_is_better=False, bar="rmse"),
            TaskMetric("r2", "coefficient of determination, at most 1", higher_is_better=True, bar="R2"),
        )

    @override
    def loss(self, output: Any, batch: Any) -> torch.Tensor:
        predicted, targets = self._aligned(output, batch)
        if self.ignore_nan:
            counted = ~targets.isnan()
            predicted, targets = predicted[counted], targets[counted]
        return self._loss(predicted, targets, "mean")

    @override
    def count(self, batch: Any) -> int:
        targets = self.targets(batch)
        return int((~targets.isnan()).sum()) if self.ignore_nan else targets.numel()

    @override
    def sums(self, output: Any, batch: Any) -> Mapping[str, Sums]:
        predicted, targets = self._aligned(output, batch, torch.float64)
        counted = ~targets.isnan() if self.ignore_nan else torch.ones_like(targets, dtype=torch.bool)
        total = int(counted.sum())
        loss = self._loss(predicted[counted], targets[counted], "sum")
        return {
            "loss": Sums(loss.item(), total),
            "mae": Sums((predicted - targets)[counted].abs().sum().item(), total),
            "squared error": ColumnSums.of(predicted, targets, counted),
        }

    @override
    def scored(self, output: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        predicted, targets = self._aligned(output, batch)
        if not self.ignore_nan:
            return predicted, targets
        counted = ~targets.isnan()
        return predicted[counted], targets[counted]

    @override
    def means(self, sums: Mapping[str, Sums]) -> Mapping[str, float]:
        columns = sums["squared error"]
        assert isinstance(columns, ColumnSums), "of `sums`"
        means = {name: sums[name].mean() for name in ("loss", "mae")}
        means["rmse"] = math.sqrt(float(columns.total.sum() / columns.count.sum()))
        varies = columns.spread > columns.count * (CONSTANT * columns.mean_target).square()
        if varies.any():
            means["r2"] = float((1 - columns.total[varies] / columns.spread[varies]).mean())
        return means

    @override
    def outputs(self, data: DataSet) -> int:
        with seeded(0, "width of the targets", 0):
            batch = data.train.batch(torch.zeros(1, dtype=torch.int64), None)
        try:
            self.check_batch(batch)
        except ValueError:
            return 1  # the trial batch says what is wrong
        targets = self.targets(batch)
        return 1 if targets.dim() < 2 else targets.shape[1]

    @override
    def is_dense(self, batch: Any) -> bool:
        return self.targets(batch).dim() > 2

    @override
    def targets(self, batch: Any) -> Any:
        targets: Any = super().targets(batch)
        is_tensor: bool = isinstance(targets, torch.Tensor)
        if is_tensor and targets.dim() > 1 and not (targets.is_floating_point() or targets.is_complex()):
            _refuse_padding(targets)
        return targets

    @override
    def check_batch(self, batch: Any) -> None:
        super().check_batch(batch)
        targets = self.targets(batch)
        if not isinstance(targets, torch.Tensor) or targets.is_complex() or targets.dim() == 0:
            kind = getattr(targets, "dtype", type(targets).__name__)
            raise ValueError(f"the targets are of type {kind}, expected a tensor of numbers (N, ...)")
        if not self.ignore_nan and targets.isnan().any():
            raise ValueError(
                "a target is NaN, expected a number; task.ignore_nan=true leaves it out, as what dataset.collate=pad adds"
            )

    @override
    def check(self, output: Any, batch: Any) -> None:
        predicted, targets = logits_of(output), self.targets(batch)
        if not isinstance(predicted, torch.Tensor) or not predicted.is_floating_point():
            kind = predicted.dtype if isinstance(predicted, torch.Tensor) else type(predicted).__name__
            raise ValueError(f"the output is of type {kind}, expected a tensor of numbers")
        if predicted.shape not in (targets.shape, (*targets.shape, 1)) and (*predicted.shape, 1) != targets.shape:
            raise ValueError(
                f"the output {tuple(predicted.shape)} does not fit targets {tuple(targets.shape)}: expected the same shape, or "
                "(N, 1) for (N,)"
            )
        if not targets.isfinite().logical_or(targets.isnan()).all():
            raise UnfitTargets("a target is infinite, expected finite numbers")

    def _aligned(self, output: Any, batch: Any, least: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Predictions and targets of one shape and dtype; without it (N, 1) and (N,) would be broadcast to (N, N).

        The dtype is that of the predictions, or ``least``, by default float32: targets are not rounded to 16 bits where a pass
        computes in them.
        """
        predicted, targets = logits_of(output), self.targets(batch)
        if predicted.shape != targets.shape:
            if predicted.numel() != targets.numel():
                raise ValueError(f"the output {tuple(predicted.shape)} does not fit targets {tuple(targets.shape)}")
            predicted = predicted.reshape(targets.shape)
        dtype = torch.promote_types(predicted.dtype, least or torch.float32)
        return predicted.to(dtype), targets.to(dtype)

    def _loss(self, predicted: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
        functional = torch.nn.functional
        if self.error is ErrorKind.l1:
            return functional.l1_loss(predicted, targets, reduction=reduction)
        if self.error is ErrorKind.huber:
            return functional.huber_loss(predicted, targets, reduction=reduction, delta=self.delta)
        return functional.mse_loss(predicted, targets, reduction=reduction)


def _refuse_padding(targets: torch.Tensor) -> None:
    """Refuse whole numbers that are padded, which would count.

    Raises:
        ValueError: they are.
    """
    if (targets.long() == IGNORED).any():
        raise ValueError(
            f"a target is {IGNORED}, with which dataset.collate=pad pads whole numbers, expected floating point, which it pads "
            "with NaN"
        )
