"""The loss of a model that computes its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, cast

import torch
from typing_extensions import override

from ormo_rpc.data import trees
from ormo_rpc.options import option, register
from ormo_rpc.tasks.base import Task
from ormo_rpc.tasks.batches import call_model, targets_of
from ormo_rpc.tasks.cross_entropy import IGNORED
from ormo_rpc.tasks.metrics import Sums


class MeanOver(Enum):
    """The targets that a model's loss is a mean over."""

    samples = "samples"
    labels = "labels"
    """Those that are not -100."""
    next_labels = "next_labels"
    """The same without the first of each sequence, which a language model does not predict."""


@register("model_loss")
@dataclass(frozen=True, kw_only=True)
class ModelLoss(Task):
    """The model returns its own loss: as ``.loss``, under the key ``loss``, as the first of a tuple, or as its only output.

    It is given the whole batch: a mapping as keywords, as transformers take it, a tuple or list as arguments.
    """

    mean_over: MeanOver = option(
        MeanOver.samples,
        "what the loss is a mean over, to weight batches of different sizes: samples, labels (that are not -100), or "
        "next_labels (of a language model: the same without the first of each sequence)",
    )

    @override
    def forward(self, model: torch.nn.Module, batch: Any) -> Any:
        if isinstance(batch, Mapping):
            return model(**cast("Mapping[str, Any]", batch))
        return call_model(model, batch)

    @override
    def loss(self, output: Any, batch: Any) -> torch.Tensor:
        return loss_of(output)

    @override
    def count(self, batch: Any) -> int:
        if self.mean_over is MeanOver.samples:
            return trees.size(batch)
        labels = targets_of(batch)
        return int(((labels[:, 1:] if self.mean_over is MeanOver.next_labels else labels) != IGNORED).sum())

    @override
    def sums(self, output: Any, batch: Any) -> Mapping[str, Sums]:
        counted = self.count(batch)
        return {"loss": Sums(loss_of(output).item() * counted if counted else 0.0, counted)}

    @override
    def check_batch(self, batch: Any) -> None:
        if self.mean_over is MeanOver.samples:
            trees.size(batch)
            return
        super().check_batch(batch)
        labels: Any = targets_of(batch)
        least = 2 if self.mean_over is MeanOver.next_labels else 1
        if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.dim() < least:
            got = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, torch.Tensor) else type(labels).__name__
            raise ValueError(f"the labels are {got}, expected numbers of them for task.mean_over={self.mean_over.value}")

    @override
    def check(self, output: Any, batch: Any) -> None:
        loss = loss_of(output)
        if not isinstance(loss, torch.Tensor) or loss.dim():
            got = f"a tensor {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else f"of type {type(output).__name__}"
            raise ValueError(
                f"the output is {got}, expected a loss of no dimension: the output itself, its first part, or its loss"
            )


def loss_of(output: Any) -> Any:
    """Return the loss in an output."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, Mapping):
        return cast("Mapping[str, Any]", output).get("loss")
    if hasattr(output, "loss"):
        return output.loss
    return cast("tuple[Any, ...]", output)[0] if isinstance(output, (tuple, list)) and output else None
