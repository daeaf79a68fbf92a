"""Page-locked CPU memory, which a GPU reads and writes by itself while the processor goes on.

Copies from and to other memory go through a buffer of the driver's, and the caller waits for them.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from typing import Any

import numpy
import torch

_READ_ONLY = 0x08
"""cudaHostRegisterReadOnly, of memory that is mapped for reading alone."""
_log = logging.getLogger(__name__)
_refused: set[int] = set()
"""The errors of the driver that were warned of."""


def zeros(size: int, *, page_locked: bool) -> torch.Tensor:
    """Make memory of zero bytes, shape (size,)."""
    return torch.zeros(size, dtype=torch.uint8, pin_memory=page_locked)


def lock(vector: torch.Tensor, *, read_only: bool = False) -> torch.Tensor:
    """Lock the pages of mapped memory, until the last tensor over the result's memory is gone.

    Locking takes time (about a millisecond for a few MB): do it once for each mapping. Where the driver refuses it, a warning
    says so once, and the memory stays as it was.

    Args:
        vector: Bytes in a mapping of their own, of which all is locked.
        read_only: The mapping is for reading alone.

    Returns:
        The same bytes. Nothing else may keep ``vector`` for longer, as it does not keep the pages locked.
    """
    storage = vector.untyped_storage()
    locked = _Locked(storage, read_only=read_only)
    if not locked.succeeded:
        return vector
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # it is not meant to be
        whole = torch.from_numpy(numpy.asarray(locked))
    start = vector.data_ptr() - storage.data_ptr()
    return whole[start : start + vector.numel() * vector.itemsize].view(vector.dtype)


class _Locked:
    """Locks memory as long as it exists, and keeps it as long: numpy's arrays over it keep this object.

    Args:
        storage: The memory.
        read_only: It is mapped for reading alone.

    Attributes:
        succeeded: The pages are locked.
    """

    def __init__(self, storage: torch.UntypedStorage, *, read_only: bool) -> None:
        self._storage = storage
        self._address = storage.data_ptr()
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (storage.nbytes(),),
            "data": (self._address, read_only),
        }
        flags = _READ_ONLY if read_only else 0
        self._cudart: Any = torch.cuda.cudart()
        error = int(self._cudart.cudaHostRegister(self._address, storage.nbytes(), flags))
        self.succeeded = error == 0
        if error:
            _report(error)

    def __del__(self) -> None:
        if getattr(self, "succeeded", False):
            with contextlib.suppress(Exception):  # at the end of the interpreter, when the driver may be gone
                self._cudart.cudaHostUnregister(self._address)


def _report(error: int) -> None:
    """Warn once of a refusal, and clear it, as the next launch of a kernel would raise it."""
    with contextlib.suppress(RuntimeError):
        torch.empty(1, device="cuda").fill_(0.0)
    if error not in _refused:
        _refused.add(error)
        _log.warning(
            "memory is not page-locked, since the driver refuses it (cudaHostRegister: error %d): copies to and from the GPU "
            "take longer",
            error,
        )
