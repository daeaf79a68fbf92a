"""The contract of a task: from a batch and a model to a loss, and to the sums that metrics are means of."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ormo_rpc.data import DataSet
from ormo_rpc.options import Part, option
from ormo_rpc.tasks.batches import call_model, check_form, inputs_of, logits_of, targets_of
from ormo_rpc.tasks.metrics import LOSS, Sums, TaskMetric, metric_named
from ormo_rpc.tasks.stateful_metrics import StatefulMetrics


class UnfitTargets(ValueError):
    """Targets that the output fits in shape, but that cannot be trained on."""


@dataclass(frozen=True, kw_only=True)
class Task(Part, ABC):
    """The loss of a batch, which is trained, and the metrics of an evaluation.

    A batch is any tree of tensors, as `Split.batch` returns it. `forward` and `targets` are for the two forms that need no
    code: a pair (inputs, targets), and a mapping that has the targets under ``labels``, ``label``, ``targets`` or ``target``. A
    task keeps nothing between batches.
    """

    PATH = "task"
    OPEN_METRICS: ClassVar[bool] = False
    """Evaluations may have metrics that are not declared before."""
    CHOOSES_DATA: ClassVar[bool] = False
    """A script evaluates on data of its own choice, so that "test" is only a name."""

    torchmetrics: dict[str, Any] = option(
        {},
        "further metrics by name: _target_ of a class of torchmetrics (or any with reset, update, compute) and its keywords",
    )

    def metrics(self) -> tuple[TaskMetric, ...]:
        """Declare the metrics that `means` returns, "loss" first."""
        return (LOSS,)

    def all_metrics(self) -> tuple[TaskMetric, ...]:
        """Declare the metrics of an evaluation: those of `metrics`, and of the option ``torchmetrics``.

        Raises:
            ValueError: an object of torchmetrics cannot be made.
        """
        return self._all_metrics

    @functools.cached_property
    def _all_metrics(self) -> tuple[TaskMetric, ...]:
        return self.metrics() + self.stateful_metrics().declared()

    def stateful_metrics(self) -> StatefulMetrics:
        """Make the objects of the option ``torchmetrics``, which are given what `scored` returns.

        Raises:
            ValueError: one cannot be made, or has the name of another metric.
        """
        taken = [each.name for each in self.metrics() if each.name in self.torchmetrics]
        if taken:
            raise ValueError(f"task.torchmetrics.{taken[0]}: the task has a metric of this name, expected another one")
        return StatefulMetrics(self.torchmetrics)

    def scored(self, output: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return predictions and targets of a batch for torchmetrics: by default the output, or its logits, and the targets."""
        return logits_of(output), self.targets(batch)

    def metric(self, name: str) -> TaskMetric:
        """Return the declaration of a metric; that of an unknown one is guessed from its name."""
        return metric_named(name, self.all_metrics())

    def forward(self, model: torch.nn.Module, batch: Any) -> Any:
        """Return what the model makes of a batch; `call_model` says which arguments it gets."""
        return call_model(model, inputs_of(batch))

    def targets(self, batch: Any) -> Any:
        """Return the targets of a batch."""
        return targets_of(batch)

    @abstractmethod
    def loss(self, output: Any, batch: Any) -> torch.Tensor:
        """Return the loss of a batch, of no dimension: the mean over the targets that count."""

    @abstractmethod
    def count(self, batch: Any) -> float:
        """Return the number, or weight, of the targets that count; 0 where the batch has no loss.

        Parts of a batch are weighted by it, so that their losses make up that of the batch.
        """

    @abstractmethod
    def sums(self, output: Any, batch: Any) -> Mapping[str, Sums]:
        """Return the sums of a batch for an evaluation, "loss" among them."""

    def means(self, sums: Mapping[str, Sums]) -> Mapping[str, float]:
        """Return the metrics of a split, given the sums over all its batches."""
        return {name: each.mean() for name, each in sums.items()}

    def outputs(self, data: DataSet) -> int:
        """Return the width of the model's output, which is passed to it as ``num_classes``; 0 where it is unknown.

        By default the number of classes, if the data set has one without counting.
        """
        return data.known_classes or 0

    def guessing_loss(self, data: DataSet) -> float:  # noqa: ARG002 - unknown by default
        """Return the loss of a model that has learnt nothing, from which a run counts as diverged; 0 where it is unknown."""
        return 0.0

    def is_dense(self, batch: Any) -> bool:  # noqa: ARG002 - the safe answer
        """Tell if outputs may take more memory than inputs; evaluations then have batches of ``train.batch_size``."""
        return True

    def check_batch(self, batch: Any) -> None:
        """Refuse a batch that is of no use for the task, before the model sees it.

        Raises:
            ValueError: the message says what came and what was expected.
        """
        check_form(batch)

    def check(self, output: Any, batch: Any) -> None:
        """Refuse an output that does not fit the targets.

        Raises:
            UnfitTargets: the targets are to blame.
            ValueError: it does not fit; the message says what came and what was expected.
        """
