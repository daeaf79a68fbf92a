"""Evaluation: loss and accuracy of given parameters on the splits that nothing is trained on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ormo_rpc.data import DataSet, Split
from ormo_rpc.models.flat import FlatModel
from ormo_rpc.seeding import seeded
from ormo_rpc.worker.objective import Tally, tally

BATCH_SIZE = 500
"""Samples in a forward pass, where each has one target; the result depends on it where samples see each other."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of an evaluation: means over the targets that count.

    Attributes:
        loss: Cross entropy on the test split.
        accuracy: The fraction of the test split's targets whose largest logit is that of the correct class, in [0, 1].
        val_loss: The loss on the validation split; None where there is none.
        val_accuracy: The accuracy on the validation split; None where there is none.
    """

    loss: float
    accuracy: float
    val_loss: float | None = None
    val_accuracy: float | None = None


class Evaluator:
    """Evaluates parameters, with a model of its own.

    The forward passes record no gradients, unless the model needs them: one that calls ``torch.autograd`` itself fails without.
    That is decided once, at the first batch. What a data set or model draws from the global generators is the same in every
    evaluation.

    Args:
        model: The model; it belongs to this object from now on.
        data: The data set.
        dense_batch_size: Samples in a forward pass, where each has many targets, and logits take more memory than inputs.
    """

    def __init__(self, model: FlatModel, data: DataSet, dense_batch_size: int = 32) -> None:
        self.model = model
        self.data = data
        self.dense_batch_size = dense_batch_size
        self._with_gradients: bool | None = None
        """True where forward passes record gradients; None until the first one."""

    def __call__(self, params: torch.Tensor, buffers: Mapping[str, torch.Tensor]) -> Evaluation:
        """Evaluate at the parameters, shape (D,), and the buffers by name; neither is modified.

        Raises:
            ValueError: the model does not fit the data, or no target of a split counts.
        """
        with seeded(0, "evaluation", 0):
            return self._evaluate(params, buffers)

    def output(self, inputs: torch.Tensor, params: torch.Tensor, buffers: Mapping[str, torch.Tensor]) -> Any:
        """Return what the model makes of one batch at these parameters, which need not be logits."""
        self._load(params, buffers)
        return self._forward(inputs, params, buffers)

    def _evaluate(self, params: torch.Tensor, buffers: Mapping[str, torch.Tensor]) -> Evaluation:
        loss, accuracy = self._means("test", self.data.test, params, buffers)
        if self.data.validation is None:
            return Evaluation(loss, accuracy)
        return Evaluation(loss, accuracy, *self._means("validation", self.data.validation, params, buffers))

    def _means(self, name: str, data: Split, params: torch.Tensor, buffers: Mapping[str, torch.Tensor]) -> tuple[float, float]:
        self._load(params, buffers)
        total = Tally()
        for indices in torch.arange(len(data)).split(self._batch_size(data)):
            inputs, targets = data.batch(indices, None)
            output = self._forward(inputs, params, buffers)
            with torch.no_grad():
                total += tally(output, targets)
        if not total.counted:
            raise ValueError(f"dataset: no target of the {name} split counts")
        return total.loss / total.counted, total.correct / total.counted

    def _batch_size(self, data: Split) -> int:
        _, targets = data.batch(torch.zeros(1, dtype=torch.int64), None)
        return self.dense_batch_size if targets.dim() > 1 + targets.is_floating_point() else BATCH_SIZE

    def _load(self, params: torch.Tensor, buffers: Mapping[str, torch.Tensor]) -> None:
        self.model.module.train()  # models that merge or cache weights in eval mode undo that, with the former parameters
        self.model.bind(params)
        self.model.buffers.load(buffers)
        self.model.module.eval()

    def _forward(self, inputs: torch.Tensor, params: torch.Tensor, buffers: Mapping[str, torch.Tensor]) -> Any:
        if self._with_gradients is not None:
            return self._pass(inputs, gradients=self._with_gradients)
        try:
            output = self._pass(inputs, gradients=False)
        except RuntimeError as error:
            self._load(params, buffers)  # the pass that failed may have changed a buffer
            output = self._pass(inputs, gradients=True)
            _log.info("evaluations record gradients, since the model fails without: %s", error)
            self._with_gradients = True
        else:
            self._with_gradients = False
        return output

    def _pass(self, inputs: torch.Tensor, *, gradients: bool) -> Any:
        with torch.set_grad_enabled(gradients):
            return self.model.module(inputs)
