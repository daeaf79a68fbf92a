"""A task whose main metric is better lower, and has two more of other kinds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from typing_extensions import override

from ormo_rpc.tasks import Sums, Task, TaskMetric

MAE = TaskMetric("mae", "mean distance of the digits", higher_is_better=False, form=".1f", bar="error")
HITS = TaskMetric("hits", "fraction of exact digits", higher_is_better=True, form=".0%")


@dataclass(frozen=True, kw_only=True)
class Distance(Task):
    """The distance of the digit with the largest logit from the target."""

    @override
    def metrics(self) -> tuple[TaskMetric, ...]:
        return (*super().metrics(), MAE, HITS)

    @override
    def loss(self, output: Tensor, batch: Any) -> Tensor:
        return cross_entropy(output, self.targets(batch))

    @override
    def count(self, batch: Any) -> int:
        return len(self.targets(batch))

    @override
    def sums(self, output: Tensor, batch: Any) -> Mapping[str, Sums]:
        targets = self.targets(batch)
        off = (output.argmax(1) - targets).abs()
        found = {"loss": cross_entropy(output, targets, reduction="sum"), "mae": off.sum(), "hits": (off == 0).sum()}
        return {name: Sums(torch.as_tensor(total, dtype=torch.float64).item(), len(targets)) for name, total in found.items()}


@dataclass(frozen=True, kw_only=True)
class Open(Distance):
    """The same task, whose evaluations may have metrics that are not declared."""

    OPEN_METRICS = True
