"""The place of training samples: in the memory of a GPU where they fit, so that batches are made there."""

from __future__ import annotations

import torch

from ormo_rpc.data.splits import Resident, Split
from ormo_rpc.errors import ConfigError

SHARE = 4
"""By default samples take at most this part of the free memory of a GPU, which other workers may share."""


def placed(split: Split, device: torch.device, on_device: bool | None) -> Split:
    """Return a split whose batches are made on a device, or the split itself, whose batches are copied there.

    Args:
        split: The samples.
        device: The device of the worker.
        on_device: ``worker.data_on_device``.

    Raises:
        ConfigError: they are to be on the device, and cannot be.
    """
    if device.type == "cpu" or on_device is False:
        return split
    if not isinstance(split, Resident):
        if on_device:
            raise ConfigError(
                "worker.data_on_device: got true, expected null or false: batches of this data set are made by its own code, "
                "on the CPU"
            )
        return split
    if on_device is None and SHARE * split.num_bytes > torch.cuda.mem_get_info(device)[0]:
        return split
    return split.to(device)
