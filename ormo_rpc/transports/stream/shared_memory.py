"""Memory that processes of one machine share: files in memory, which have no name in any directory.

A *segment* is made by ``memfd_create`` and known by its process and its descriptor there; another process of the same user
opens it as ``/proc/PROCESS/fd/DESCRIPTOR``. It is gone with the last process that has it, however that ends, so nothing can be
left in ``/dev/shm``. That a descriptor is the segment that was meant, rather than anything on another machine or in another
container, where that process number means somebody else, is known from its name, which the kernel tells and which has 128 bits
of chance. Its size is sealed: nobody can shrink it under a reader, who would die of that; and so is its content, for all but
its maker, who has mapped it before.

Every segment costs two descriptors here (Python keeps one with a mapping), and one in each process that opens it. So no more
are made once the table of open files is half full: connections and files need the rest, and what lies in other memory goes by
TCP.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import resource
import secrets
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ormo_rpc.kernels.pool import anonymous

AVAILABLE = sys.platform == "linux"
"""Whether this system has such files."""


_SEAL_FUTURE_WRITE = 0x0010
"""From Linux 5.1 on, and in Python's own list from 3.13 on."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentHandle:
    """Where a process's segments are found.

    Attributes:
        process: The process that made them.
        name: The name of each of them.
    """

    process: int
    name: str


class SharedMemoryPool:
    """Makes segments, for as long as this object lives; each vector in them is found again by its address."""

    def __init__(self) -> None:
        self.origin = SegmentHandle(process=os.getpid(), name=f"ormo_rpc_{secrets.token_hex(16)}")
        self._descriptors: dict[int, int] = {}
        self._warned = False

    def __call__(self, size: int) -> mmap.mmap:
        """Memory of that many bytes, all zero, on pages that are there already; where there is no room, it is not shared."""
        try:
            return self._shared(size)
        except OSError as error:
            if not self._warned:
                _log.warning("memory is not shared from now on, so what lies in it goes by TCP: %s", error)
            self._warned = True
            return anonymous(size)

    def _shared(self, size: int) -> mmap.mmap:
        descriptor = os.memfd_create(self.origin.name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            if limit != resource.RLIM_INFINITY and 2 * descriptor > limit:  # the lowest number that is free
                raise OSError(errno.EMFILE, f"half of the {limit} open files that a process may have (ulimit -n) are open")
            os.ftruncate(descriptor, max(size, 1))
            memory = mmap.mmap(descriptor, max(size, 1), flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
            with contextlib.suppress(OSError):  # an older system: the others are still asked to map it for reading only
                fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEAL_FUTURE_WRITE)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptors[_bytes(memory).data_ptr()] = descriptor
        return memory

    def vector(self, size: int) -> Tensor:
        """The same as a tensor of bytes, shape (size,)."""
        return _bytes(self(size))[: max(size, 1)]  # a mapping has whole pages

    def find(self, vector: Tensor) -> int | None:
        """The descriptor of the segment at whose start a vector lies; None where it lies elsewhere."""
        return self._descriptors.get(vector.data_ptr())

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)  # the memory itself lives as long as a tensor that shares it


def attach(origin: SegmentHandle, descriptor: int, size: int) -> Tensor:
    """The first bytes of another process's segment, shape (size,). Who writes to them is killed by the system.

    Raises:
        OSError: it is not there, not ours to read, too small, or not what was meant: the other process is on another machine.
    """
    place, expected = f"/proc/{origin.process}/fd/{descriptor}", f"/memfd:{origin.name} (deleted)"
    if str(Path(place).readlink()) != expected:  # looked at before, too, since merely opening some things has effects
        raise FileNotFoundError(f"{place} is not the segment that was meant")
    ours = os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)  # it may be a FIFO by now, and hold us
    try:
        if str(Path(f"/proc/self/fd/{ours}").readlink()) != expected:
            raise FileNotFoundError(f"{place} is not the segment that was meant")
        if not fcntl.fcntl(ours, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK or os.fstat(ours).st_size < size:
            raise OSError(f"{place} is too small, or its size can change")
        return _bytes(mmap.mmap(ours, max(size, 1), flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ))[:size]
    finally:
        os.close(ours)


def _bytes(memory: mmap.mmap) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # it is not meant to be
        return torch.frombuffer(memory, dtype=torch.uint8)
