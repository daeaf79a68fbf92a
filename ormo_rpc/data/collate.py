"""From the items of a data set to a batch, with an error that names what no batch can be made of."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch

from ormo_rpc.data.trees import leaves

Collate = Callable[[Sequence[Any]], Any]
"""Makes a batch of a list of items."""
TARGET_KEYS = ("labels", "label", "targets", "target")
"""Keys of the targets in an item or batch that is a mapping, the first of them that there is."""
_REMEDY = "make numbers of it, leave it out, or make the batch yourself: dataset.collate=my_module.my_function"


def default(items: Sequence[Any]) -> Any:
    """Stack the items as torch's ``default_collate`` does.

    Raises:
        ValueError: they hold something that is neither tensor nor number, or tensors of different shapes.
    """
    refuse_others(items[0])
    try:
        return torch.utils.data.default_collate(list(items))
    except RuntimeError as error:
        if "equal size" not in str(error):
            raise
        raise ValueError(f"items have different shapes ({error}); dataset.collate=pad pads them to the longest") from error


def target_key(item: Mapping[str, Any]) -> str | None:
    """Return the key of the targets in an item or a batch; None where it has none of `TARGET_KEYS`."""
    return next((key for key in TARGET_KEYS if key in item), None)


def refuse_others(item: object) -> None:
    """Refuse an item that holds anything but tensors and numbers.

    Raises:
        ValueError: the message has the place of the first one, and what to do.
    """
    for place, leaf in leaves(item):
        if not is_numeric(leaf):
            kind = "None" if leaf is None else f"a {type(leaf).__name__}"
            raise ValueError(f"item{place} is {kind}, expected a tensor or numbers; {_REMEDY}")


def is_numeric(leaf: object) -> bool:
    """Tell if tensors can be made of a leaf of an item."""
    if isinstance(leaf, np.ndarray):
        return cast("np.ndarray[Any, Any]", leaf).dtype.kind in "biufc"
    return isinstance(leaf, (torch.Tensor, numbers.Number, np.generic))
