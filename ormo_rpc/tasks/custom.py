"""The user's own loss."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from typing_extensions import override

from ormo_rpc.data import trees
from ormo_rpc.options import CallsTarget, register
from ormo_rpc.options.imports import locate
from ormo_rpc.options.instantiate import instantiate
from ormo_rpc.tasks.base import Task
from ormo_rpc.tasks.metrics import LOSS, Sums

WHOLE = ("model", "batch")
"""The parameters of a function that computes everything itself."""


@register("custom")
@dataclass(frozen=True, kw_only=True)
class CustomTask(Task, CallsTarget):
    """A loss of your own: the function or class that ``task._target_`` names, the keys beside it are its keywords.

    * A function ``(output, targets)``, or a class of `torch.nn.Module` with such a call, as all of `torch.nn.functional` and
      `torch.nn` are: the output is that of the model for the inputs of a batch.
    * A function ``(model, batch)``, by these names: it computes everything itself.

    Either returns the loss, a mean over the samples of the batch, or a pair (loss, metrics): numbers by name, which are means
    over the samples too. A subclass of `Task` is more: sums and counts of any kind, and which metric is better higher.
    """

    OPEN_METRICS = True
    OWN: ClassVar[tuple[str, ...]] = ("torchmetrics",)

    @functools.cached_property
    def _function(self) -> Callable[..., Any]:
        """The function, with the user's keywords; of a class an object of it."""
        found = locate(self.PATH, self._target_)
        if isinstance(found, type):
            return instantiate(self.PATH, self._target_, self.kwargs)
        return functools.partial(found, **self.kwargs)

    @functools.cached_property
    def _computes_all(self) -> bool:
        """True for a function of a model and a batch."""
        try:
            names = list(inspect.signature(self._function).parameters)
        except ValueError:  # some built-in functions have none
            return False
        return tuple(names[:2]) == WHOLE

    @override
    def forward(self, model: torch.nn.Module, batch: Any) -> Any:
        return self._function(model, batch) if self._computes_all else super().forward(model, batch)

    @override
    def loss(self, output: Any, batch: Any) -> torch.Tensor:
        return self._result(output, batch)[0]

    @override
    def count(self, batch: Any) -> int:
        return trees.size(batch)

    @override
    def sums(self, output: Any, batch: Any) -> Mapping[str, Sums]:
        loss, metrics = self._result(output, batch)
        if LOSS.name in metrics:
            raise ValueError(f"task._target_: {self._target_} returned a metric of the name {LOSS.name}, expected another name")
        size = self.count(batch)
        values = {LOSS.name: loss.item(), **{name: float(value) for name, value in metrics.items()}}
        return {name: Sums(value * size, size) for name, value in values.items()}

    @override
    def scored(self, output: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if self._computes_all:
            raise ValueError(f"task.torchmetrics: {self._target_} of (model, batch) returns no predictions, expected none")
        return super().scored(output, batch)

    @override
    def check_batch(self, batch: Any) -> None:
        if self._computes_all:
            trees.size(batch)
        else:
            super().check_batch(batch)

    @override
    def check(self, output: Any, batch: Any) -> None:
        targets = None if self._computes_all else self.targets(batch)
        if not isinstance(output, torch.Tensor) or not isinstance(targets, torch.Tensor) or not targets.is_floating_point():
            return
        one_more = (*targets.shape, 1) == output.shape or (*output.shape, 1) == targets.shape
        if self._target_.startswith("torch.") and one_more:
            raise ValueError(
                f"the output {tuple(output.shape)} and the targets {tuple(targets.shape)} would be broadcast against each "
                "other; expected the same shape"
            )

    def _result(self, output: Any, batch: Any) -> tuple[torch.Tensor, Mapping[str, Any]]:
        """The loss, and metrics by name."""
        made: Any = output if self._computes_all else self._function(output, self.targets(batch))
        match made:
            case (loss, Mapping() as metrics):
                return loss, cast("Mapping[str, Any]", metrics)
            case _:
                return made, {}
