"""Metrics of torchmetrics beside those of a task, and other objects with ``reset``, ``update`` and ``compute``."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any, cast

import torch

from ormo_rpc.options.instantiate import instantiate
from ormo_rpc.tasks.metrics import TaskMetric, metric_named

KEY = "task.torchmetrics"
_METHODS = ("reset", "update", "compute")


class StatefulMetrics:
    """Metrics of one split after the other, each an object that sees all of its batches.

    Args:
        specs: ``_target_`` and keywords of each object, by the name of the metric.

    Raises:
        ValueError: one cannot be made; the message has its key.
    """

    def __init__(self, specs: Mapping[str, Any]) -> None:
        self._objects = {str(name): _made(f"{KEY}.{name}", spec) for name, spec in specs.items()}

    def declared(self) -> tuple[TaskMetric, ...]:
        """Declare the metrics; which direction is better is known of the objects, or else by their names."""
        return tuple(_declared(name, each) for name, each in self._objects.items())

    def begin(self) -> None:
        """Forget the split before."""
        for each in self._objects.values():
            each.reset()

    def update(self, predicted: torch.Tensor, targets: torch.Tensor) -> None:
        """Add a batch; the objects are on the CPU, wherever it is.

        Raises:
            ValueError: an object does not take it.
        """
        predicted, targets = predicted.cpu(), targets.cpu()
        for name, each in self._objects.items():
            try:
                each.update(predicted, targets)
            except Exception as error:  # of others
                raise ValueError(f"{KEY}.{name}: {type(error).__name__}: {error}") from error

    def compute(self) -> dict[str, float]:
        """Return the values for the batches since `begin`.

        Raises:
            ValueError: one is not a single number.
        """
        return {name: _number(f"{KEY}.{name}", each.compute()) for name, each in self._objects.items()}

    def __bool__(self) -> bool:
        return bool(self._objects)


def _made(key: str, spec: Any) -> Any:
    if not isinstance(spec, Mapping) or not isinstance(cast("Mapping[str, Any]", spec).get("_target_"), str):
        raise ValueError(f"{key}: got {spec!r}, expected _target_, such as torchmetrics.classification.MulticlassF1Score")
    keywords = {str(name): value for name, value in cast("Mapping[Any, Any]", spec).items()}
    target: str = keywords.pop("_target_")
    library = target.partition(".")[0]
    if library == "torchmetrics" and importlib.util.find_spec(library) is None:
        raise ValueError(f"{key}: torchmetrics is not installed; pip install torchmetrics")
    try:
        made = instantiate(key, target, keywords)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(key) else f"{key}: {text}") from error
    except Exception as error:  # of others
        raise ValueError(f"{key}: {target} cannot be made: {type(error).__name__}: {error}") from error
    lacking = [name for name in _METHODS if not callable(getattr(made, name, None))]
    if lacking:
        raise ValueError(f"{key}: {target} has no {lacking[0]}(), expected an object with {', '.join(_METHODS)}")
    return made


def _declared(name: str, made: Any) -> TaskMetric:
    guessed, known = metric_named(name), getattr(made, "higher_is_better", None)
    if not isinstance(known, bool):
        return guessed
    return TaskMetric(name, type(made).__name__, higher_is_better=known, bar=name)


def _number(key: str, value: Any) -> float:
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        raise ValueError(f"{key}: compute() returned a tensor {tuple(value.shape)}, expected one number: an average")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{key}: compute() returned {type(value).__name__}, expected one number") from None
