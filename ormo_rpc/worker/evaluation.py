"""Evaluation: a task's metrics of given parameters on the splits that nothing is trained on."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ormo_rpc import devices
from ormo_rpc.data import DataSet, Split
from ormo_rpc.data.placing import placed
from ormo_rpc.data.trees import to_device
from ormo_rpc.models.flat import FlatModel
from ormo_rpc.seeding import seeded
from ormo_rpc.tasks import Classification, Sums, Task
from ormo_rpc.worker.forward import autocast as under_autocast

BATCH_SIZE = 500
"""Samples in a forward pass, where outputs are small; the result depends on it where samples see each other."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        test: The metrics of the test split by name, "loss" first.
        validation: Those of the validation split; None where there is none.
    """

    test: Mapping[str, float]
    validation: Mapping[str, float] | None = None


class Evaluator:
    """Evaluates parameters, with a model of its own.

    The forward passes record no gradients, unless the model needs them: one that calls ``torch.autograd`` itself fails without.
    That is decided once, at the first batch. What a data set or model draws from the global generators is the same in every
    evaluation.

    Args:
        model: The model; it belongs to this object from now on.
        data: The data set.
        task: The metrics; by default those of classification.
        dense_batch_size: Samples in a forward pass, where outputs may take more memory than inputs.
        autocast: The dtype of passes under ``torch.autocast``, that of training; None for none.
        device: The device that the model is moved to at the first evaluation, as a GPU takes its time to begin; by default it
            stays where it is.
        data_on_device: Keep the splits on a GPU as well; None: where they fit into a part of what is free.
    """

    def __init__(
        self,
        model: FlatModel,
        data: DataSet,
        task: Task | None = None,
        dense_batch_size: int = 32,
        autocast: torch.dtype | None = None,
        device: torch.device | None = None,
        data_on_device: bool | None = None,
    ) -> None:
        self.model = model
        self._device = device or model.device
        self.data = data
        self._wanted = None if data_on_device else data_on_device  # what is the user's own code stays, and is copied
        self._placed: dict[str, Split] = {}
        self.task = task or Classification()
        self._stateful = self.task.stateful_metrics()
        self.dense_batch_size = dense_batch_size
        self._autocast = functools.partial(under_autocast, autocast, self._device.type)
        self._with_gradients: bool | None = None
        """True where forward passes record gradients; None until the first one."""

    def __call__(self, params: torch.Tensor, buffers: Mapping[str, torch.Tensor]) -> Evaluation:
        """Evaluate at the parameters, shape (D,), and the buffers by name; neither is modified.

        Raises:
            ValueError: the model does not fit the data, or no target of a split counts.
        """
        self.model = self.model.to(devices.use(self._device))
        with seeded(0, "evaluation", 0):
            return self._evaluate(params, buffers)

    def output(self, batch: Any, params: torch.Tensor, buffers: Mapping[str, torch.Tensor]) -> Any:
        """Return what the model makes of one batch at these parameters, which the task need not accept."""
        self._load(params, buffers)
        return self._forward(batch, params, buffers)

    def _evaluate(self, params: torch.Tensor, buffers: Mapping[str, torch.Tensor]) -> Evaluation:
        test = self._means("test", self.data.test, params, buffers)
        if self.data.validation is None:
            return Evaluation(test)
        return Evaluation(test, self._means("validation", self.data.validation, params, buffers))

    def _means(self, name: str, data: Split, params: torch.Tensor, buffers: Mapping[str, torch.Tensor]) -> Mapping[str, float]:
        self._load(params, buffers)
        if name not in self._placed:
            self._placed[name] = placed(data, self._device, self._wanted)
        data = self._placed[name]
        totals: dict[str, Sums] = {}
        self._stateful.begin()
        for indices in torch.arange(len(data)).split(self._batch_size(data)):
            batch = to_device(data.batch(indices, None), self.model.device)
            output = self._forward(batch, params, buffers)
            with torch.no_grad(), self._autocast():  # a loss of the user's own computes in what it trains in
                for metric, sums in self.task.sums(output, batch).items():
                    totals[metric] = totals[metric] + sums if metric in totals else sums
                if self._stateful:
                    self._stateful.update(*self.task.scored(output, batch))
        if not totals["loss"].counts:
            raise ValueError(f"dataset: no target of the {name} split counts")
        return {**self.task.means(totals), **self._stateful.compute()}

    def _batch_size(self, data: Split) -> int:
        one = data.batch(torch.zeros(1, dtype=torch.int64), None)
        return self.dense_batch_size if self.task.is_dense(one) else BATCH_SIZE

    def _load(self, params: torch.Tensor, buffers: Mapping[str, torch.Tensor]) -> None:
        self.model.module.train()  # models that merge or cache weights in eval mode undo that, with the former parameters
        self.model.bind(params.to(self.model.device))
        self.model.buffers.load(buffers)
        self.model.module.eval()

    def _forward(self, batch: Any, params: torch.Tensor, buffers: Mapping[str, torch.Tensor]) -> Any:
        if self._with_gradients is not None:
            return self._pass(batch, gradients=self._with_gradients)
        try:
            output = self._pass(batch, gradients=False)
        except RuntimeError as error:
            self._load(params, buffers)  # the pass that failed may have changed a buffer
            output = self._pass(batch, gradients=True)
            _log.info("evaluations record gradients, since the model fails without: %s", error)
            self._with_gradients = True
        else:
            self._with_gradients = False
        return output

    def _pass(self, batch: Any, *, gradients: bool) -> Any:
        with torch.set_grad_enabled(gradients), self._autocast():
            return self.task.forward(self.model.module, batch)
