"""The targets that losses of torch are means over, where they are not all rows of a batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ormo_rpc.tasks import cross_entropy


@dataclass(frozen=True)
class ClassWeights:
    """Counts the targets of a cross entropy, by the weights of their classes.

    Args:
        ignored: The class number that does not count.
        weights: The weight of each class, shape (C,); None for 1.
    """

    ignored: int
    weights: torch.Tensor | None

    def count(self, targets: torch.Tensor) -> float:
        """Return what the sum of the losses is divided by; probabilities have no weights there, as in torch."""
        if self.weights is None or targets.is_floating_point():
            return cross_entropy.count(targets, self.ignored)
        classes = targets.long()
        return float(self.weights.to(targets.device)[classes[classes != self.ignored]].double().sum())


def class_weights(function: Callable[..., Any]) -> ClassWeights | None:
    """Return how a loss counts its targets, where it is the mean cross entropy of torch; None where it is anything else.

    Args:
        function: An object of a class of `torch.nn`, or a partial function of `torch.nn.functional`.
    """
    modules = (torch.nn.CrossEntropyLoss, torch.nn.NLLLoss)
    functions = (torch.nn.functional.cross_entropy, torch.nn.functional.nll_loss)
    if isinstance(function, modules):
        is_torchs = any(type(function).forward is each.forward for each in modules)
        return _of(vars(function) | dict(function.named_buffers())) if is_torchs else None
    if isinstance(function, functools.partial) and any(function.func is each for each in functions) and not function.args:
        return _of(function.keywords)
    return None


def _of(options: Mapping[str, Any]) -> ClassWeights | None:
    legacy = any(options.get(key) is not None for key in ("size_average", "reduce"))
    if legacy or options.get("reduction", "mean") != "mean":
        return None
    return ClassWeights(options.get("ignore_index", cross_entropy.IGNORED), options.get("weight"))
