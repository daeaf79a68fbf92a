"""The inputs of a recorded pass: a batch at fixed addresses, or the numbers that make one of resident data."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Protocol

import torch

from ormo_rpc.data import Resident, trees
from ormo_rpc.worker.recording import refused


class Inputs(Protocol):
    """A batch for a recorded pass."""

    def put(self, batch: Any) -> None:
        """Copy the next batch, or the numbers that make it, to the fixed addresses."""
        ...

    def batch(self) -> Any:
        """Return the batch, made on the device where it is made there."""
        ...


class Draws:
    """Numbers that make a batch on the device.

    Args:
        split: The split, on the device.
        draws: The first batch's numbers, int64, shape (rows, B).
        device: The device.
    """

    def __init__(self, split: Resident, draws: torch.Tensor, device: torch.device) -> None:
        self._split = split
        self._draws = torch.empty_like(draws, device=device)

    def put(self, batch: Any) -> None:
        """Copy the next numbers; nobody waits for it where they lie in page-locked memory."""
        self._draws.copy_(batch, non_blocking=True)

    def batch(self) -> Any:
        """Make the batch."""
        return self._split.make(self._draws)


class Copied:
    """A batch that was made elsewhere.

    Args:
        batch: The first one.
        device: The device.
    """

    def __init__(self, batch: Any, device: torch.device) -> None:
        self._batch = trees.map_tensors(lambda leaf: torch.empty_like(leaf, device=device), batch)
        self._tensors = [tensor for _, tensor in trees.tensors(self._batch)]

    def put(self, batch: Any) -> None:
        """Copy the next batch."""
        for tensor, (_, value) in zip(self._tensors, trees.tensors(batch), strict=True):
            tensor.copy_(value, non_blocking=True)

    def batch(self) -> Any:
        """Return it: the same tensors each time, in a new tree."""
        return trees.map_tensors(lambda leaf: leaf, self._batch)


def form_of(batch: Any) -> Hashable:
    """Return what two batches have in common that one recording can serve: shapes, dtypes and all else.

    Raises:
        ModelRefused: there is no such thing.
    """
    form: list[Hashable] = []
    for place, leaf in trees.leaves(batch):
        if isinstance(leaf, torch.Tensor):
            form.append((place, tuple(leaf.shape), leaf.dtype))
        elif isinstance(leaf, (type(None), bool, int, float, str)):
            form.append((place, leaf))
        else:
            raise refused(
                f"got a batch with a {type(leaf).__name__} at {place or 'its root'}, expected tensors, numbers and texts"
            )
    return tuple(form)
