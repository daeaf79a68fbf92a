"""Tensors of a module that share memory with its trainable parameters, which training moves to other memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch

from ormo_rpc.models.buffers import is_dense


def refuse_shared(trainable: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> None:
    """Refuse a parameter or buffer that lies in the memory of a trainable parameter.

    In plain PyTorch it would follow the parameter, as optimizers write in place; here it would stay as it was built.

    Args:
        trainable: The trainable parameters, by name.
        others: All further parameters and buffers, by name.

    Raises:
        ValueError: there is one; the message has the names and what to do.
    """
    by_storage: dict[int, list[tuple[str, torch.Tensor]]] = defaultdict(list)
    for name, tensor in (*trainable.items(), *others.items()):
        if not torch.nn.parameter.is_lazy(tensor) and is_dense(tensor) and tensor.numel():
            by_storage[tensor.untyped_storage().data_ptr()].append((name, tensor))
    for tensors in by_storage.values():
        if len(tensors) > 1:
            _refuse_overlap(tensors, trainable)


def _refuse_overlap(tensors: list[tuple[str, torch.Tensor]], trainable: Mapping[str, torch.Tensor]) -> None:
    """Refuse a tensor that has a byte of a trainable one; all are of one storage, the trainable ones first."""
    taken: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        places = _bytes_of(tensor)
        for owner, theirs in taken.items():
            if (places & theirs).any():
                raise ValueError(
                    f"model: {name}: got the memory of {owner}, which is trained, expected memory of its own; share a "
                    "parameter by assigning the Parameter itself to both modules, or copy it (clone)"
                )
        if name in trainable:
            taken[name] = places


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Tell of each byte of a tensor's storage if the tensor has it."""
    size = tensor.dtype.itemsize
    places = torch.zeros(tensor.untyped_storage().nbytes(), dtype=torch.bool)
    steps = [size * step for step in tensor.stride()]
    places.as_strided((*tensor.shape, size), (*steps, 1), size * tensor.storage_offset()).fill_(True)
    return places
