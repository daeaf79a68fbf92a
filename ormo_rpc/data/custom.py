"""The user's own data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from typing_extensions import override

from ormo_rpc.data.collate import Collate, default
from ormo_rpc.data.findings import Classes, first_batch, input_shape
from ormo_rpc.data.padding import Pad
from ormo_rpc.data.sources import DataSource
from ormo_rpc.data.splits import DataSet
from ormo_rpc.data.user_sets import by_role, split_of
from ormo_rpc.options import CallsTarget, at_least_one, option, register
from ormo_rpc.options.imports import is_dotted_path, locate

COLLATES = ("default", "pad")


@register("custom")
@dataclass(frozen=True, kw_only=True)
class CustomData(DataSource, CallsTarget):
    """A data set of your own: the function that ``dataset._target_`` names, the keys beside it are its keywords.

    It returns a `DataSet`; a pair (train, test) or a triple (train, test, validation); or a mapping that has them under these
    names, such as a ``DatasetDict`` of Hugging Face. Each of them is a map-style dataset of torch, a ``datasets.Dataset``, or
    an iterable dataset that has a length. ``dataset.collate`` makes batches of their items; the task says what a batch must be.

    The number of classes, where the task needs one, is the keyword ``num_classes`` if given, else the length of the training
    set's attribute ``classes``, else that of the first item's probabilities or the largest training target plus one, for which
    the launcher reads the whole set once; the log says which. The input shape is that of the first training item.

    ``dataset.validation`` holds out training samples, unless the function takes that keyword itself; what a map-style dataset
    does to its items at random it does to those held out as well.
    """

    OWN: ClassVar[tuple[str, ...]] = ("validation", "counted_classes", "own_validation", "collate", "pad_values", "weights")

    counted_classes: int | None = option(
        None,
        "number of classes, where the launcher has counted them for the other processes",
        valid=at_least_one,
        expected="a whole number >= 1",
    )
    own_validation: bool = option(False, "the function returns a validation split, as the launcher has found")
    collate: str = option(
        "default",
        "makes a batch of a list of items: default (torch's), pad (to the longest item), or the dotted path of your function",
        valid=lambda v: v in COLLATES or is_dotted_path(v),
        expected="default, pad, or a dotted path such as my_package.my_module.my_function",
    )
    pad_values: dict[str, float] = option(
        {}, "padding by column where dataset.collate=pad, in place of -100 or NaN for targets and 0 for all else"
    )
    weights: str | None = option(
        None,
        "weights, shape (N,), by which each epoch draws N training samples with replacement: the dotted path of a function of "
        "the training set, or the name of its attribute",
        valid=lambda v: v.isidentifier() or is_dotted_path(v),
        expected="a dotted path such as my_package.my_module.my_function, or the name of an attribute",
    )

    @override
    def load(self) -> DataSet:
        made = self.call()
        if isinstance(made, DataSet):
            weights = made.weights if self.weights is None else self._weights_of(made.train)
            return made.training_on(made.train, made.validation, weights)
        try:
            datasets, collate = by_role(made), self._collate()
            splits = {role: split_of(role, dataset, collate) for role, dataset in datasets.items()}
        except ValueError as error:
            raise self._refused(error) from None
        batch = first_batch(splits["train"], self._target_)
        number: int | Callable[[], int] = Classes(datasets["train"], splits["train"], batch, self._target_)
        if self.counted_classes is not None or "num_classes" in self.kwargs:
            number = self.counted_classes or int(self.kwargs["num_classes"])
        weights = None if self.weights is None else self._weights_of(datasets["train"])
        data = DataSet(**splits, input_shape=input_shape(batch), num_classes=number, weights=weights)
        data.close()  # what the first batch has opened is not for the processes that are forked from this one
        return data

    @override
    def with_findings(self, data: DataSet) -> DataSource:
        known = "num_classes" in self.kwargs or not data.known_classes
        classes = self.counted_classes if known else data.known_classes
        own_validation = data.validation is not None and not self.validation
        return dataclasses.replace(self, counted_classes=classes, own_validation=own_validation)

    @property
    @override
    def has_validation(self) -> bool:
        return self.own_validation or super().has_validation

    def _collate(self) -> Collate:
        if self.pad_values and self.collate != "pad":
            raise ValueError(
                f"dataset.pad_values: got values with dataset.collate={self.collate}, expected dataset.collate=pad"
            )
        named: dict[str, Collate] = {"default": default, "pad": Pad(self.pad_values)}
        return named.get(self.collate) or locate("dataset", self.collate, "collate")

    def _weights_of(self, train: Any) -> Any:
        assert self.weights is not None
        if is_dotted_path(self.weights):
            return locate("dataset", self.weights, "weights")(train)
        try:
            return getattr(train, self.weights)
        except AttributeError:
            raise ValueError(
                f"dataset.weights: {type(train).__name__} has no attribute {self.weights!r}; expected the name of one that "
                "holds a weight for each training sample, or the dotted path of a function that returns them"
            ) from None

    def _refused(self, error: ValueError) -> ValueError:
        text = str(error)
        return error if text.startswith("dataset.") else ValueError(f"dataset._target_: {self._target_} {text}")
