"""Trees of tensors: tuples, lists, mappings, named tuples and dataclasses, nested in any way.

A tensor with at least one dimension has a row for each sample. All else that is no such container is a leaf that passes
through: None, numbers, texts, tensors without dimensions, objects of other classes.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, TypeVar, cast

import torch

T = TypeVar("T")


def tensors(batch: object) -> list[tuple[str, torch.Tensor]]:
    """Return the tensors of a tree in order, each with its place there, such as ``['mask']`` or ``[0].inputs``."""
    return [(place, leaf) for place, leaf in leaves(batch) if isinstance(leaf, torch.Tensor)]


def leaves(tree: object) -> Iterator[tuple[str, Any]]:
    """Yield all leaves in order, each with its place in the tree; the tree itself has the place ""."""
    found = _children(tree)
    if found is None:
        yield "", tree
        return
    for place, child in found:
        for rest, leaf in leaves(child):
            yield place + rest, leaf


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], batch: T) -> T:
    """Return a tree of the same form, whose tensors are those that the function returns; the given one stays as it is."""
    return cast("T", _mapped(lambda leaf: function(leaf) if isinstance(leaf, torch.Tensor) else leaf, batch))


def to_device(batch: T, device: torch.device) -> T:
    """Return a tree whose tensors are on a device; on the CPU the tree itself.

    They are copied through page-locked memory, and nobody waits for it.
    """
    if device.type == "cpu":
        return batch

    def there(leaf: torch.Tensor) -> torch.Tensor:
        page_locked = leaf.pin_memory() if leaf.device.type == "cpu" else leaf
        return page_locked.to(device, non_blocking=True)

    return map_tensors(there, batch)


def size(batch: object) -> int:
    """Return the number of samples: the first dimension of its tensors.

    Raises:
        ValueError: it has no tensor with a dimension, or they have different numbers of rows.
    """
    rows = [(place, len(leaf)) for place, leaf in tensors(batch) if leaf.dim()]
    if not rows:
        raise ValueError(f"the batch has no tensor with a dimension of samples: got {type(batch).__name__}")
    place, first = rows[0]
    for other, count in rows:
        if count != first:
            raise ValueError(
                f"batch{place} has {first} rows and batch{other} has {count}, expected as many in all tensors: one a sample"
            )
    return first


def narrow(batch: T, start: int, stop: int) -> T:
    """Return the samples from number ``start`` to before ``stop``, as views of the same memory."""
    return map_tensors(lambda leaf: leaf[start:stop] if leaf.dim() else leaf, batch)


def _children(tree: object) -> list[tuple[str, Any]] | None:
    """The children of a container with their places in it; None for a leaf."""
    if isinstance(tree, Mapping):
        return [(f"[{key!r}]", child) for key, child in cast("Mapping[Any, Any]", tree).items()]
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return [(f".{name}", getattr(tree, name)) for name in cast("Any", tree)._fields]
    if isinstance(tree, (tuple, list)):
        return [(f"[{number}]", child) for number, child in enumerate(cast("list[Any]", tree))]
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [(f".{field.name}", getattr(tree, field.name)) for field in dataclasses.fields(tree)]
    return None


def _mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    children = _children(tree)
    if children is None:
        return function(tree)
    mapped = [_mapped(function, child) for _, child in children]
    kind: Any = type(tree)
    if isinstance(tree, Mapping):
        return _mapping(tree, dict(zip(cast("Mapping[Any, Any]", tree), mapped, strict=True)))
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return kind(*mapped)
    if isinstance(tree, (tuple, list)):
        return kind(mapped)
    made = copy.copy(tree)  # `dataclasses.replace` refuses fields that are no arguments of the constructor
    for field, child in zip(dataclasses.fields(tree), mapped, strict=True):
        object.__setattr__(made, field.name, child)  # of a frozen one too
    return made


def _mapping(like: Mapping[Any, Any], values: dict[Any, Any]) -> Mapping[Any, Any]:
    """A mapping of the kind of another one, such as an ordered one or a subclass, with these values."""
    kind: Any = type(like)
    if kind is dict:
        return values
    if isinstance(like, MutableMapping):
        made = copy.copy(like)
        made.update(values)
        return made
    return kind(values)
