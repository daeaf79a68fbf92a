"""Findings about a user's data set: the shape of its inputs, and the number of its classes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence, Sized
from typing import Any, cast

import torch

from ormo_rpc.data.collate import target_key
from ormo_rpc.data.splits import Split
from ormo_rpc.seeding import seeded

_log = logging.getLogger(__name__)


def first_batch(split: Split, described: str) -> Any:
    """Return a batch of the first sample.

    Raises:
        ValueError: there is none, or no batch can be made of it.
    """
    if not len(split):
        raise ValueError(f"dataset._target_: {described} returned an empty training set")
    try:
        return split.batch(torch.zeros(1, dtype=torch.int64), None)
    except (TypeError, ValueError) as error:
        raise ValueError(f"dataset._target_: the first item of {described} makes no batch: {error}") from error


def input_shape(batch: Any) -> tuple[int, ...]:
    """Return the shape of one sample's input, where it is a single tensor; () where it is not."""
    if isinstance(batch, Mapping):
        named = cast("Mapping[str, Any]", batch)
        key = target_key(named)
        inputs = [each for name, each in named.items() if name != key]
        found = inputs[0] if len(inputs) == 1 else None
    else:
        found = cast("Sequence[Any]", batch)[0] if isinstance(batch, (tuple, list)) and batch else None
    return tuple(found.shape[1:]) if isinstance(found, torch.Tensor) else ()


class Classes:
    """Finds the number of classes of a training set, when somebody asks.

    Args:
        dataset: What the user's function has returned to train on.
        split: The split of it.
        first: The batch of its first sample.
        described: The function, for messages.
    """

    def __init__(self, dataset: Any, split: Split, first: Any, described: str) -> None:
        self._dataset = dataset
        self._split = split
        self._first = first
        self._described = described

    def __call__(self) -> int:
        """Return the number, where every class number counts; see `without`."""
        return self.without(None)

    def without(self, ignored: int | None) -> int:
        """Return the number: that of the names of the classes, or as counted, for which all is read once.

        Args:
            ignored: The class number of targets that do not count, such as 255, which is no class; negative ones never are.

        Raises:
            ValueError: the targets are no classes.
        """
        with seeded(0, "classes", 0):
            number, origin = self._found(ignored)
        _log.info("%s: %d classes, from %s", self._described, number, origin)
        return number

    def _found(self, ignored: int | None) -> tuple[int, str]:
        classes = getattr(self._dataset, "classes", None)
        batch = self._first
        targets = self._targets(batch)
        if isinstance(classes, Sized):
            return len(classes), "its attribute classes"
        features: Any = getattr(self._dataset, "features", None)
        if isinstance(batch, Mapping) and isinstance(features, Mapping):
            named = getattr(features.get(target_key(batch)), "num_classes", None)
            if isinstance(named, int):
                return named, "its features"
        if targets.is_floating_point():
            return targets.shape[1], "its probabilities"
        largest = max(_largest(self._targets(self._batch(index)), ignored) for index in range(len(self._split)))
        return 1 + largest, "its largest target"

    def _batch(self, index: int) -> Any:
        return self._split.batch(torch.tensor([index]), None)

    def _targets(self, batch: Any) -> torch.Tensor:
        """The targets of a batch, where they can be classes."""
        expected = (
            f"dataset._target_: the items of {self._described} must be pairs (input, class number or tensor of them or of "
            "class probabilities) or mappings with one of labels, label, targets, target to be classified"
        )
        if isinstance(batch, Mapping):
            key = target_key(cast("Mapping[str, Any]", batch))
            targets: Any = None if key is None else batch[key]
        else:
            pair = isinstance(batch, (tuple, list)) and len(cast("Sequence[Any]", batch)) == 2
            targets = cast("Sequence[Any]", batch)[1] if pair else None
        if targets is None:
            raise ValueError(f"{expected}; the first makes a batch of type {type(batch).__name__}")
        wrong = not isinstance(targets, torch.Tensor) or targets.is_complex()
        if wrong or (targets.is_floating_point() and targets.dim() < 2):
            raise ValueError(f"{expected}; the first has the target {targets!r}; for numbers: task=regression")
        return targets


def _largest(targets: torch.Tensor, ignored: int | None) -> int:
    """The largest class number but for one; 0 at least, which also stands for targets that do not count."""
    targets = targets.long()
    counted = targets if ignored is None else targets[targets != ignored]
    return max(0, int(counted.max())) if counted.numel() else 0
