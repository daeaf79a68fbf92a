"""Classification: one class for each target, of a whole sample or of each of its places."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from typing_extensions import override

from ormo_rpc.data import DataSet
from ormo_rpc.options import register
from ormo_rpc.tasks import cross_entropy
from ormo_rpc.tasks.base import Task
from ormo_rpc.tasks.batches import logits_of
from ormo_rpc.tasks.metrics import LOSS, Sums, TaskMetric

ACCURACY = TaskMetric(
    "accuracy",
    "fraction of the targets whose largest logit is that of their class",
    higher_is_better=True,
    form=".2%",
    bar="accuracy",
)


@register("classification")
@dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """Cross entropy of logits (N, C, ...) and class numbers (N, ...), of which -100 does not count, or class probabilities.

    The logits are the output, or what it has under the name ``logits``.
    """

    @override
    def metrics(self) -> tuple[TaskMetric, ...]:
        return (LOSS, ACCURACY)

    @override
    def loss(self, output: Any, batch: Any) -> torch.Tensor:
        return cross_entropy.mean_loss(logits_of(output), self.targets(batch))

    @override
    def count(self, batch: Any) -> int:
        return cross_entropy.count(self.targets(batch))

    @override
    def sums(self, output: Any, batch: Any) -> Mapping[str, Sums]:
        logits, targets = logits_of(output), self.targets(batch)
        cross_entropy.check_fit(logits, targets)
        return cross_entropy.sums(logits, targets)

    @override
    def outputs(self, data: DataSet) -> int:
        return data.num_classes

    @override
    def guessing_loss(self, data: DataSet) -> float:
        return math.log(max(1, data.num_classes))

    @override
    def is_dense(self, batch: Any) -> bool:
        targets = self.targets(batch)
        return targets.dim() > 1 + targets.is_floating_point()

    @override
    def check_batch(self, batch: Any) -> None:
        super().check_batch(batch)
        cross_entropy.check_targets(self.targets(batch))

    @override
    def check(self, output: Any, batch: Any) -> None:
        logits, targets = logits_of(output), self.targets(batch)
        cross_entropy.check_fit(logits, targets)
        cross_entropy.check_classes(logits, targets)
