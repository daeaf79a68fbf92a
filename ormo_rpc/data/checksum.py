"""A checksum of some labels, by which processes and checkpoints tell that they number the same samples in the same order."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from ormo_rpc.data.collate import target_key
from ormo_rpc.data.splits import DataSet
from ormo_rpc.data.trees import tensors
from ormo_rpc.seeding import seeded

LABELS_READ = 16
"""The number of samples whose labels are read."""


def checksum_of_labels(data: DataSet, seed: int) -> int:
    """Return a checksum of some labels of the training set, and of the samples' weights where there are any.

    Of a pair (inputs, targets) class numbers count; of any other batch the targets that it has under a name, or all tensors, if
    they are of integers. What may be decoded or augmented differently on another machine is left out: floating point and bytes.
    """
    train, total = data.train, len(data.train)
    count = min(total, LABELS_READ)
    places = torch.arange(count) if data.in_order else torch.linspace(0, total - 1, count).long()
    with seeded(seed, "fingerprint", 0):
        batches = [train.batch(place.view(1), None) for place in places]
    data.close()  # the processes that are forked from this one open it for themselves
    pairs = [cast("Sequence[Any]", each) for each in batches if _is_pair(each)]
    numbers = [int(targets) for _, targets in pairs if targets.numel() == 1 and not targets.is_floating_point()]
    found = zlib.crc32(torch.tensor(numbers).numpy().tobytes())
    for batch in batches:
        if not _is_pair(batch):
            found = _of_integers(batch, found)
    return found if data.weights is None else zlib.crc32(data.weights.numpy().tobytes(), found)


def _is_pair(batch: object) -> bool:
    return isinstance(batch, (tuple, list)) and len(cast("Sequence[Any]", batch)) == 2 and torch.is_tensor(batch[1])


def _of_integers(batch: Any, start: int) -> int:
    """A checksum of the shapes and values of the tensors of integers."""
    key: Any = target_key(cast("Mapping[str, Any]", batch)) if isinstance(batch, Mapping) else None
    if isinstance(batch, (tuple, list)) and len(cast("Sequence[Any]", batch)) == 2:
        key = 1
    for _, each in tensors(batch if key is None else batch[key]):
        if not each.is_floating_point() and not each.is_complex() and each.dtype is not torch.uint8:
            start = zlib.crc32(repr(tuple(each.shape)).encode(), start)
            start = zlib.crc32(each.to(torch.int64).contiguous().numpy().tobytes(), start)
    return start
