"""Segmentation: a class for each pixel, or for each place of any other grid."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from typing_extensions import override

from ormo_rpc.data import DataSet
from ormo_rpc.options import option, register
from ormo_rpc.tasks import cross_entropy
from ormo_rpc.tasks.base import Task
from ormo_rpc.tasks.batches import logits_of
from ormo_rpc.tasks.metrics import LOSS, Sums, TaskMetric


@register("segmentation")
@dataclass(frozen=True, kw_only=True)
class Segmentation(Task):
    """Cross entropy of each pixel: logits (N, C, ...) and class numbers (N, ...), a mean over all pixels that count.

    The logits are the output, or what it has under the name ``logits`` or ``out``. The intersection over union of a class is
    that of its pixels in the whole split; ``mean_iou`` is the mean over the classes that occur, in targets or predictions.
    """

    ignore_index: int = option(
        cross_entropy.IGNORED,
        "class number of a pixel that does not count, such as 255",
        valid=cross_entropy.is_class_number,
        expected=cross_entropy.CLASS_NUMBER,
    )

    @override
    def metrics(self) -> tuple[TaskMetric, ...]:
        return (
            LOSS,
            TaskMetric(
                "accuracy", "fraction of the pixels whose largest logit is that of their class", True, ".2%", "accuracy"
            ),
            TaskMetric("mean_iou", "intersection over union, mean over the classes", True, ".2%", "IoU"),
        )

    @override
    def loss(self, output: Any, batch: Any) -> torch.Tensor:
        return cross_entropy.mean_loss(logits_of(output), self.targets(batch), self.ignore_index)

    @override
    def count(self, batch: Any) -> int:
        return cross_entropy.count(self.targets(batch), self.ignore_index)

    @override
    def sums(self, output: Any, batch: Any) -> Mapping[str, Sums]:
        logits, targets = logits_of(output), cross_entropy.as_targets(self.targets(batch))
        cross_entropy.check_fit(logits, targets)
        classes, counted = logits.shape[1], targets != self.ignore_index
        found, right = logits.argmax(1)[counted], targets[counted]
        pairs = torch.bincount(right * classes + found, minlength=classes**2).view(classes, classes)
        both = pairs.diagonal()
        return {
            "loss": cross_entropy.loss_sum(logits, targets, self.ignore_index),
            "accuracy": Sums(int(both.sum()), int(counted.sum())),
            "mean_iou": Sums(both, pairs.sum(0) + pairs.sum(1) - both),
        }

    @override
    def outputs(self, data: DataSet) -> int:
        return data.classes_without(self.ignore_index)

    @override
    def guessing_loss(self, data: DataSet) -> float:
        return math.log(max(1, data.classes_without(self.ignore_index)))

    @override
    def check_batch(self, batch: Any) -> None:
        super().check_batch(batch)
        targets = self.targets(batch)
        if not isinstance(targets, torch.Tensor) or targets.is_floating_point() or targets.is_complex():
            kind = getattr(targets, "dtype", type(targets).__name__)
            raise ValueError(f"the targets are of type {kind}, expected a tensor of class numbers (N, ...), one a pixel")

    @override
    def check(self, output: Any, batch: Any) -> None:
        logits, targets = logits_of(output), self.targets(batch)
        cross_entropy.check_fit(logits, targets)
        cross_entropy.check_classes(logits, targets, self.ignore_index)
