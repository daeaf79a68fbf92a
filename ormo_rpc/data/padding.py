"""Batches of items of different lengths: all are padded to the longest one."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from ormo_rpc.data.collate import refuse_others, target_key

IGNORED = -100
"""The padding of targets that are whole numbers: the class number that does not count in `torch.nn.functional.cross_entropy`.

That of targets of floating point is NaN.
"""
MASK = "attention_mask"


@dataclass(frozen=True)
class Pad:
    """Makes a batch of items of the same form, whose tensors or lists of numbers may have different sizes.

    Each is padded at its end, along every dimension, to the largest of the batch: targets with `IGNORED`, or NaN where they are
    of floating point, all else with 0. Targets are the columns named ``labels``, ``label``, ``targets`` or ``target`` (the
    first that there is) and of tuples the last of several, with all that these hold; items that are a sequence of whole numbers
    and nothing else, as such tokens are targets too. Dtypes stay, unless the padding is no number of theirs. Items that are
    mappings without an ``attention_mask`` get one, int64 of shape (B, length): 1 where ``input_ids``, or else the first column
    that has a length, is no padding.

    Args:
        values: Other values than these by column; in tuples by place, such as ``"0"``.
    """

    values: Mapping[str, float] = dataclasses.field(default_factory=dict[str, float])

    def __call__(self, items: Sequence[Any]) -> Any:
        """Make the batch.

        Raises:
            ValueError: the items have different forms, or hold something that is neither tensor nor number.
        """
        refuse_others(items[0])
        batch = self._batch("0", items, target=None)
        if isinstance(batch, dict) and MASK not in batch:
            self._add_mask(cast("dict[str, Any]", batch), items)
        return batch

    def _batch(self, name: str, entries: Sequence[Any], *, target: bool | None) -> Any:
        """Put the entries of all items at one place together; ``target`` is None for the items themselves."""
        first = entries[0]
        if isinstance(first, Mapping):
            return self._columns(cast("Sequence[Mapping[str, Any]]", entries), target=target)
        if dataclasses.is_dataclass(first) and not isinstance(first, type):
            names = [field.name for field in dataclasses.fields(first)]
            columns = self._columns([{key: getattr(each, key) for key in names} for each in entries], target=target)
            return dataclasses.replace(first, **columns)
        if isinstance(first, tuple) or (isinstance(first, list) and not _is_of_numbers(first)):
            return self._parts(cast("Sequence[Sequence[Any]]", entries), target=target)
        try:
            tensors = [torch.as_tensor(entry) for entry in entries]
            exact = _is_exact(_common_dtype(tensors))
            is_target = target or (target is None and exact and all(each.dim() == 1 for each in tensors))
            default = 0 if not is_target else IGNORED if exact else math.nan
            return padded(tensors, self.values.get(name, default))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"no batch can be made of {name!r} of the items: {error}") from error

    def _columns(self, items: Sequence[Mapping[str, Any]], *, target: bool | None) -> dict[str, Any]:
        first = items[0]
        other = next((item for item in items if item.keys() != first.keys()), None)
        if other is not None:
            raise ValueError(f"items have the columns {list(first)} and {list(other)}, expected the same in all")
        key = target_key(first)
        return {
            name: self._batch(name, [item[name] for item in items], target=name != MASK and (target or name == key))
            for name in first
        }

    def _parts(self, items: Sequence[Sequence[Any]], *, target: bool | None) -> Any:
        first = items[0]
        other = next((item for item in items if len(item) != len(first)), None)
        if other is not None:
            raise ValueError(f"items have {len(first)} and {len(other)} parts, expected as many in all")
        names: Sequence[str] = getattr(first, "_fields", [str(place) for place in range(len(first))])
        last = len(names) - 1
        parts = [
            self._batch(name, [item[place] for item in items], target=target or (target is None and 0 < place == last))
            for place, name in enumerate(names)
        ]
        return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)

    def _add_mask(self, batch: dict[str, Any], items: Sequence[Mapping[str, Any]]) -> None:
        target = target_key(batch)
        long = {name: each for name, each in batch.items() if name != target and getattr(each, "ndim", 0) > 1}
        name = "input_ids" if "input_ids" in long else next(iter(long), None)
        if name is not None:
            lengths = torch.tensor([len(item[name]) for item in items])
            batch[MASK] = (torch.arange(long[name].shape[1]) < lengths[:, None]).long()


def padded(tensors: Sequence[torch.Tensor], value: float) -> torch.Tensor:
    """Stack tensors, padded at their ends to the largest size along each dimension.

    Args:
        tensors: Each with the same number of dimensions; an empty list has any dtype.
        value: The padding; of dtypes that do not have it, such as uint8 of -100, int64 is made.

    Raises:
        ValueError: the numbers of dimensions differ, or whole numbers are to be padded with a fraction.
    """
    shapes = {tuple(each.shape) for each in tensors}
    dtype = _padded_dtype(_common_dtype(tensors), value) if tensors[0].dim() else _common_dtype(tensors)
    if len(shapes) == 1:
        return torch.stack([each.to(dtype) for each in tensors])
    if len({len(shape) for shape in shapes}) > 1:
        raise ValueError(f"the shapes are {sorted(shapes, key=len)}, expected as many dimensions in each")
    if _is_exact(dtype) and not float(value).is_integer():
        raise ValueError(f"the padding is {value}, expected a whole number for {dtype}")
    batch = torch.full((len(tensors), *map(max, zip(*shapes, strict=True))), value, dtype=dtype)
    for row, each in zip(batch, tensors, strict=True):
        row[tuple(slice(size) for size in each.shape)] = each
    return batch


def _padded_dtype(dtype: torch.dtype, value: float) -> torch.dtype:
    """Return the dtype of batches, of those as well in which nothing is padded."""
    if not _is_exact(dtype) or not float(value).is_integer():
        return dtype
    least, largest = (0, 1) if dtype is torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return dtype if least <= value <= largest else torch.int64


def _common_dtype(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    """The dtype of a batch; that of an empty tensor does not count."""
    filled = [each for each in tensors if each.numel()] or tensors
    return functools.reduce(torch.promote_types, [each.dtype for each in filled])


def _is_exact(dtype: torch.dtype) -> bool:
    """Tell if a dtype is of whole numbers."""
    return not dtype.is_floating_point and not dtype.is_complex


def _is_of_numbers(entry: list[Any]) -> bool:
    """Tell if a list is one tensor: numbers, or lists of numbers at any depth."""
    return all(isinstance(each, (numbers.Number, np.generic)) for each in entry) or all(
        isinstance(each, list) and _is_of_numbers(cast("list[Any]", each)) for each in entry
    )
