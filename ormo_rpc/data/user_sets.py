"""Splits of whatever a user's function returns: map-style and iterable datasets, and those of Hugging Face ``datasets``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch

from ormo_rpc.data.collate import Collate, is_numeric
from ormo_rpc.data.iterables import IterableSplit
from ormo_rpc.data.splits import MapSplit, Split
from ormo_rpc.data.trees import leaves

_log = logging.getLogger(__name__)
_ROLES = ("train", "test", "validation")
EXPECTED = (
    "a DataSet, a pair (train, test) or a triple (train, test, validation) of datasets, or a mapping that has them under "
    "these names"
)
"""The forms that a user's function may return."""


@runtime_checkable
class ColumnStyle(Protocol):
    """A ``datasets.Dataset``, whose items are mappings from its columns' names to plain values until it is given a format."""

    @property
    def column_names(self) -> Sequence[str]:
        """The columns."""
        ...

    def with_format(self, type: str, columns: Sequence[str]) -> Any:  # noqa: A002 - its name there
        """Return the same rows with tensors in these columns alone."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def by_role(made: object) -> Mapping[str, Any]:
    """Return the datasets of what a user's function has returned, by "train", "test" and maybe "validation".

    Raises:
        ValueError: it is something else; the message says what.
    """
    if isinstance(made, Mapping):
        found = cast("Mapping[str, Any]", made)
        missing = [role for role in _ROLES[:2] if role not in found]
        if missing:
            raise ValueError(
                f"returned a {type(made).__name__} of {', '.join(map(str, found)) or 'nothing'}, and {missing[0]} is missing; "
                f"expected {EXPECTED}"
            )
        if others := [str(name) for name in found if name not in _ROLES]:
            _log.info("not used of the data set: %s", ", ".join(others))
        return {role: found[role] for role in _ROLES if role in found}
    if isinstance(made, (tuple, list)) and len(cast("Sequence[Any]", made)) in (2, 3):
        return dict(zip(_ROLES, cast("Sequence[Any]", made), strict=False))
    length = f" of {len(cast('Sequence[Any]', made))}" if isinstance(made, (tuple, list)) else ""
    raise ValueError(f"returned {type(made).__name__}{length}, expected {EXPECTED}")


def split_of(role: str, dataset: Any, collate: Collate) -> Split:
    """Make a split of a dataset.

    Raises:
        ValueError: it is no dataset, or of an unknown length; the message says what it is.
    """
    if hasattr(dataset, "PURE") and hasattr(dataset, "batch"):
        return dataset
    if isinstance(dataset, torch.utils.data.DataLoader):
        raise ValueError(
            f"returned DataLoader to {role} on, expected its dataset: batches are made here (train.batch_size, dataset.collate)"
        )
    kind: type[Any] = type(dataset)
    # The base class of torch's iterable sets has a __getitem__, which refuses to be called.
    numbered = hasattr(dataset, "__getitem__") and not issubclass(kind, torch.utils.data.IterableDataset)
    if isinstance(dataset, (Mapping, str)) or not (numbered or hasattr(dataset, "__iter__")):
        raise ValueError(
            f"returned {kind.__name__} to {role} on, expected a map-style dataset (__len__ and __getitem__) or an iterable one "
            "of known length (__len__ and __iter__)"
        )
    try:
        length = len(dataset)
    except (TypeError, NotImplementedError) as error:
        raise ValueError(
            f"returned {kind.__name__} without a length to {role} on; give it a __len__, the number of samples of each "
            f"pass: {error}"
        ) from None
    if not numbered:
        return IterableSplit(dataset, collate)
    if length and isinstance(dataset, ColumnStyle):
        dataset = _formatted(role, dataset)
    return MapSplit(dataset, collate)


def _formatted(role: str, dataset: ColumnStyle) -> Any:
    """Have the rows of a ``datasets.Dataset`` as tensors; columns of texts and the like are left out, as its Trainer does."""
    form: Any = getattr(dataset, "format", None)
    if isinstance(form, Mapping) and cast("Mapping[str, Any]", form).get("type") is not None:
        return dataset  # the user has given it one
    row = dataset[0]
    kept = [name for name in dataset.column_names if all(is_numeric(leaf) for _, leaf in leaves(row[name]))]
    left_out = [name for name in dataset.column_names if name not in kept]
    if not kept:
        raise ValueError(f"returned a dataset to {role} on none of whose columns has numbers: {', '.join(left_out)}")
    if left_out:
        _log.info("columns of the %s set that are no numbers, and are left out: %s", role, ", ".join(left_out))
    return dataset.with_format("torch", columns=kept)
