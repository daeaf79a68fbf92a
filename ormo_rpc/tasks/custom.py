"""The user's own loss."""

from __future__ import annotations

import functools
import inspect
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from typing_extensions import override

from ormo_rpc.data import trees
from ormo_rpc.errors import ConfigError, one_line
from ormo_rpc.options import CallsTarget, register
from ormo_rpc.options.imports import locate
from ormo_rpc.options.instantiate import instantiate
from ormo_rpc.tasks.base import Task
from ormo_rpc.tasks.metrics import LOSS, Sums
from ormo_rpc.tasks.torch_losses import ClassWeights, class_weights

TOLERANCE = 1e-3
"""The difference, relative and absolute, from which a loss is no mean over samples; at 16 bits it is larger."""
_log = logging.getLogger(__name__)
_warn_once = functools.cache(_log.warning)
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
    over the samples too. The cross entropy and the NLL loss of torch are means over the targets that are not their
    ``ignore_index``, by the weights of the classes, and are counted so. Of another loss that leaves targets out, means over a
    split are those of its batches, weighted by their samples; a function of output and targets is warned of.

    A subclass of `Task` is more: sums and counts of any kind, and which metric is better higher.
    """

    OPEN_METRICS = True
    OWN: ClassVar[tuple[str, ...]] = ("torchmetrics",)

    @functools.cached_property
    def _function(self) -> Callable[..., Any]:
        """The function, with the user's keywords; of a class an object of it."""
        found = locate(self.PATH, self._target_)
        if not isinstance(found, type):
            return functools.partial(found, **self.kwargs)
        try:
            return instantiate(self.PATH, self._target_, self.kwargs)
        except (TypeError, RuntimeError) as error:
            lists = any(isinstance(value, list) for value in self.kwargs.values())
            hint = "; a keyword that is to be a tensor has the keys _target_=torch.tensor and data=[...]" if lists else ""
            raise ConfigError(f"{self.PATH}._target_: {self._target_} cannot be made: {one_line(error)}{hint}") from error

    @functools.cached_property
    def _computes_all(self) -> bool:
        """True for a function of a model and a batch."""
        try:
            names = list(inspect.signature(self._function).parameters)
        except ValueError:  # some built-in functions have none
            return False
        return tuple(names[:2]) == WHOLE

    @functools.cached_property
    def _class_weights(self) -> ClassWeights | None:
        """The weights of the targets, where they are known; None where samples are counted."""
        return class_weights(self._function)

    @override
    def forward(self, model: torch.nn.Module, batch: Any) -> Any:
        return self._function(model, batch) if self._computes_all else super().forward(model, batch)

    @override
    def loss(self, output: Any, batch: Any) -> torch.Tensor:
        return self._result(output, batch)[0]

    @override
    def count(self, batch: Any) -> float:
        return trees.size(batch) if self._class_weights is None else self._class_weights.count(self.targets(batch))

    @override
    def sums(self, output: Any, batch: Any) -> Mapping[str, Sums]:
        loss, metrics = self._result(output, batch)
        if LOSS.name in metrics:
            raise ValueError(f"task._target_: {self._target_} returned a metric of the name {LOSS.name}, expected another name")
        size = self.count(batch)
        values = {LOSS.name: loss.item(), **{name: float(value) for name, value in metrics.items()}}
        return {name: Sums(value * size if size else 0.0, size) for name, value in values.items()}

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
        if self._computes_all:
            return
        targets = self.targets(batch)
        if isinstance(output, torch.Tensor) and isinstance(targets, torch.Tensor) and targets.is_floating_point():
            one_more = (*targets.shape, 1) == output.shape or (*output.shape, 1) == targets.shape
            if self._target_.startswith("torch.") and one_more:
                raise ValueError(
                    f"the output {tuple(output.shape)} and the targets {tuple(targets.shape)} would be broadcast against each "
                    "other; expected the same shape"
                )
        if self._class_weights is None and not self._is_mean_of_halves(output, batch):
            _warn_once(
                "task._target_: %s: the loss of a batch is not that of its two halves, weighted by their samples, so it is no "
                "mean over samples, by which evaluations count; expected such a mean, or a subclass of ormo_rpc.tasks.Task, "
                "which has counts of its own",
                self._target_,
            )

    def _is_mean_of_halves(self, output: Any, batch: Any) -> bool:
        """Compare the loss of a batch with those of its halves; True where nothing is known, as of a loss that draws."""
        try:
            size = trees.size(batch)
            if size < 2 or trees.size(output) != size:
                return True
            half = size // 2
            cuts = ((0, size), (0, size), (0, half), (half, size))
            with torch.no_grad():
                whole, again, *halves = (
                    float(self._result(trees.narrow(output, *cut), trees.narrow(batch, *cut))[0]) for cut in cuts
                )
        except Exception:  # of the user's own: it may not take a part, and says of the whole what is wrong
            return True
        if whole != again or not math.isfinite(whole):
            return True
        floats = (each for _, each in trees.tensors(output) if each.is_floating_point())
        tolerance = max([TOLERANCE, *(4 * torch.finfo(each.dtype).eps for each in floats)])
        return math.isclose(whole, (halves[0] * half + halves[1] * (size - half)) / size, rel_tol=tolerance, abs_tol=tolerance)

    def _result(self, output: Any, batch: Any) -> tuple[torch.Tensor, Mapping[str, Any]]:
        """The loss, and metrics by name."""
        made: Any = output if self._computes_all else self._function(output, self.targets(batch))
        match made:
            case (loss, Mapping() as metrics):
                return loss, cast("Mapping[str, Any]", metrics)
            case _:
                return made, {}
