"""The user's own data set."""

from __future__ import annotations

import logging
from collections.abc import Sized
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor
from torch.utils.data import default_collate
from typing_extensions import override

from ormo_rpc.data.sources import DataSource
from ormo_rpc.data.splits import DataSet, MapSplit, MapStyle
from ormo_rpc.options import CallsTarget, register

_log = logging.getLogger(__name__)


@register("custom")
@dataclass(frozen=True, kw_only=True)
class CustomData(DataSource, CallsTarget):
    """A data set of your own: the function that ``dataset._target_`` names, the keys beside it are its keywords.

    It returns a `DataSet`, or a pair (train, test) of map-style datasets of torch. Of a pair the input shape is that of the
    first training item. The number of classes is the keyword ``num_classes`` if given, else the length of the training set's
    attribute ``classes``, else the largest training label plus one, for which the whole set is read once; the log says which.
    """

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

    def _from_pair(self, train: MapStyle, test: MapStyle) -> DataSet:
        if not len(train):
            raise ValueError(f"dataset._target_: {self._target_} returned an empty training set")
        try:
            inputs, labels = default_collate([train[0]])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self._item_fault()}: {error}") from error
        if not _are_labels(labels):
            raise ValueError(f"{self._item_fault()}; the first has the label {labels!r}")
        return DataSet(MapSplit(train), MapSplit(test), tuple(inputs.shape[1:]), self._num_classes(train))

    def _num_classes(self, train: MapStyle) -> int:
        classes = getattr(train, "classes", None)
        if "num_classes" in self.kwargs:
            number, origin = int(self.kwargs["num_classes"]), "dataset.num_classes"
        elif isinstance(classes, Sized):
            number, origin = len(classes), "its attribute classes"
        else:
            number, origin = 1 + max(int(train[index][1]) for index in range(len(train))), "its largest label"
        _log.info("%s: %d classes, from %s", self._target_, number, origin)
        return number

    def _wrong(self, made: object) -> ValueError:
        return ValueError(
            f"dataset._target_: {self._target_} returned {type(made).__name__}, "
            "expected a DataSet or a pair (train, test) of map-style datasets"
        )

    def _item_fault(self) -> str:
        return f"dataset._target_: the items of {self._target_} must be pairs (input tensor, class number)"


def _are_labels(labels: Any) -> bool:
    """Tell whether the collated labels of one item are class numbers: an integer tensor, shape (1,)."""
    return isinstance(labels, Tensor) and labels.shape == (1,) and not (labels.is_floating_point() or labels.is_complex())
