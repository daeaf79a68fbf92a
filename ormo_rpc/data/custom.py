"""The user's own data set."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sized
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from typing_extensions import override

from ormo_rpc.data.sources import DataSource
from ormo_rpc.data.splits import DataSet, MapSplit, MapStyle
from ormo_rpc.options import CallsTarget, at_least_one, option, register

_log = logging.getLogger(__name__)


@register("custom")
@dataclass(frozen=True, kw_only=True)
class CustomData(DataSource, CallsTarget):
    """A data set of your own: the function that ``dataset._target_`` names, the keys beside it are its keywords.

    It returns a `DataSet`, or a pair (train, test) of map-style datasets of torch, whose targets are class numbers: one for
    each item, or an integer tensor of them; or class probabilities, a tensor (C, ...) for each item. Of a pair the input shape
    is that of the first training item. The number of classes is the keyword ``num_classes`` if given, else the length of the
    training set's attribute ``classes``, else that of the first item's probabilities or the largest training target plus one,
    for which the launcher reads the whole set once; the log says which.

    ``dataset.validation`` holds out training samples, unless the function takes that keyword itself; a `DataSet` may have a
    validation split of its own instead. What a map-style dataset does to its items at random it does to those held out as well.
    """

    OWN: ClassVar[tuple[str, ...]] = ("validation", "counted_classes")

    counted_classes: int | None = option(
        None,
        "number of classes, where the launcher has counted them for the other processes",
        valid=at_least_one,
        expected="a whole number >= 1",
    )

    @override
    def load(self) -> DataSet:
        made = self.call()
        if isinstance(made, DataSet):
            return made
        if not isinstance(made, (tuple, list)):
            raise self._wrong(made)
        match cast("list[Any]", made):
            case [MapStyle() as train, MapStyle() as test]:
                return self._from_pair(train, test)
            case _:
                raise self._wrong(cast("object", made))

    @override
    def with_findings(self, data: DataSet) -> DataSource:
        known = "num_classes" in self.kwargs or data.num_classes < 1
        return self if known else dataclasses.replace(self, counted_classes=data.num_classes)

    def _from_pair(self, train: MapStyle, test: MapStyle) -> DataSet:
        if not len(train):
            raise ValueError(f"dataset._target_: {self._target_} returned an empty training set")
        try:
            inputs, targets = torch.utils.data.default_collate([train[0]])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self._item_fault()}: {error}") from error
        if not isinstance(inputs, torch.Tensor):
            raise ValueError(f"{self._item_fault()}; the first has an input of type {type(inputs).__name__}")
        if not isinstance(targets, torch.Tensor) or targets.is_complex() or (targets.is_floating_point() and targets.dim() < 2):
            raise ValueError(f"{self._item_fault()}; the first has the target {targets!r}")
        return DataSet(MapSplit(train), MapSplit(test), tuple(inputs.shape[1:]), self._num_classes(train, targets))

    def _num_classes(self, train: MapStyle, first: torch.Tensor) -> int:
        classes = getattr(train, "classes", None)
        if self.counted_classes is not None:
            return self.counted_classes
        if "num_classes" in self.kwargs:
            number, origin = int(self.kwargs["num_classes"]), "dataset.num_classes"
        elif isinstance(classes, Sized):
            number, origin = len(classes), "its attribute classes"
        elif first.is_floating_point():
            number, origin = first.shape[1], "its probabilities"
        else:
            number, origin = 1 + max(_largest(train[index][1]) for index in range(len(train))), "its largest target"
        _log.info("%s: %d classes, from %s", self._target_, number, origin)
        return number

    def _wrong(self, made: object) -> ValueError:
        return ValueError(
            f"dataset._target_: {self._target_} returned {type(made).__name__}, "
            "expected a DataSet or a pair (train, test) of map-style datasets"
        )

    def _item_fault(self) -> str:
        expected = "pairs (input tensor, class number or tensor of them or of class probabilities)"
        return f"dataset._target_: the items of {self._target_} must be {expected}"


def _largest(target: Any) -> int:
    """The largest class number in the target of one item; 0 at least, which also stands for targets that do not count."""
    numbers = torch.as_tensor(target)
    return max(0, int(numbers.max())) if numbers.numel() else 0
