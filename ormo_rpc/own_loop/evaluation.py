"""Evaluation by a function of the script's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ormo_rpc.errors import EvaluationFailed
from ormo_rpc.models.flat import FlatModel
from ormo_rpc.options.imports import fault, place_of
from ormo_rpc.seeding import seeded
from ormo_rpc.worker.evaluation import Evaluation

EvaluateFunction = Callable[[Any], "float | torch.Tensor | Mapping[str, float | torch.Tensor]"]
"""From a model, in eval mode, to a loss, or to metrics by name."""


@dataclass(frozen=True)
class OwnFunction:
    """An evaluation as the script has registered it.

    Attributes:
        function: The script's function.
        every: Iterations between two evaluations; None for the configured number.
        higher_is_better: Metrics that are better higher; where it is empty, names tell.
    """

    function: EvaluateFunction
    every: int | None = None
    higher_is_better: Sequence[str] = ()


class OwnEvaluator:
    """Evaluates parameters by the script's function, which may do with the model as it likes.

    What it draws from the global generators is the same in every evaluation.

    Args:
        model: A copy of the script's model; it belongs to this object from now on.
        function: The script's function.
    """

    def __init__(self, model: FlatModel, function: EvaluateFunction) -> None:
        self.model = model
        self.function = function

    def __call__(self, params: torch.Tensor, buffers: Mapping[str, torch.Tensor]) -> Evaluation:
        """Evaluate at the parameters, shape (D,), and the buffers by name; neither is modified.

        Raises:
            EvaluationFailed: the function has failed, or has returned no numbers; the message has its line.
        """
        model = self.model
        model.module.train()  # modules that merge or cache weights in eval mode undo that, with the former parameters
        model.bind(params.to(model.device, copy=True))  # the server's own would be written to by a function that changes them
        model.buffers.load(buffers)
        model.module.eval()
        try:
            with seeded(0, "evaluation", 0), torch.no_grad():
                result = self.function(model.module)
        except (Exception, SystemExit) as error:  # a script's function may raise anything
            raise EvaluationFailed(fault(error)) from error
        try:
            return Evaluation(numbers(result))
        except TypeError as error:
            raise EvaluationFailed(f"{place_of(self.function)}{error}") from error


def numbers(result: object) -> dict[str, float]:
    """Read what a script's function has returned.

    Raises:
        TypeError: it is neither a number nor a mapping of names to numbers.
    """
    if not isinstance(result, Mapping):
        return {"loss": number("the evaluation", result)}
    found = {name: number(f"the evaluation's {name!r}", value) for name, value in result.items()}
    if not found or not all(isinstance(name, str) and name.isidentifier() for name in found):
        raise TypeError(f"the evaluation returned {list(found)}, expected metrics by names such as 'loss' or 'top5_accuracy'")
    return dict(sorted(found.items(), key=lambda item: item[0] != "loss"))


def number(what: str, value: Any) -> float:
    """Read a number, or a tensor of one element.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value.detach())
    if isinstance(value, (int, float)) or (hasattr(value, "item") and getattr(value, "size", 0) == 1):
        return float(value)
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else ""
    raise TypeError(f"{what} is of type {type(value).__name__}{shape}, expected a number")
