"""Memory that processes of one machine share: files in memory, which have no name in any directory.

A *segment* is made by ``memfd_create`` and identified by its process and its descriptor there; another process of the same user
opens it as ``/proc/PID/fd/DESCRIPTOR``. It is freed with the last process that has it, however that ends, so nothing can be
left in ``/dev/shm``. On another machine or in another container, the same process number is another process; the segment is
therefore checked by its name, which the kernel reports and which has 128 random bits. Its size is sealed, since a reader of a
file that shrinks dies; and so is its content, for all but its maker, who has mapped it before.

Every segment costs two descriptors here (Python keeps one with a mapping), and one in each process that attaches it. So no more
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

from ormo_rpc.kernels.pool import anonymous

AVAILABLE = sys.platform == "linux"
"""True on systems with files in memory (memfd_create)."""

_SEAL_FUTURE_WRITE = 0x0010
"""From Linux 5.1 on, and in Python's own list from 3.13 on."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentHandle:
    """Identifies a segment for another process.

    Attributes:
        pid: The process that made it.
        name: The name of all segments of its pool.
        descriptor: Its descriptor in that process.
        offset: The first byte that is meant.
    """

    pid: int
    name: str
    descriptor: int
    offset: int = 0


class SharedMemoryPool:
    """Makes segments, which exist as long as this object; each vector in them is found by its address."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.name = f"ormo_rpc_{secrets.token_hex(16)}"
        self._descriptors: dict[int, int] = {}
        self._warned = False

    def __call__(self, size: int) -> mmap.mmap:
        """Make memory of that many zero bytes, on pages that are present; where there is no room, it is not shared."""
        try:
            return self._shared(size)
        except OSError as error:
            if not self._warned:
                _log.warning("memory is not shared from now on; its vectors go by TCP: %s", error)
            self._warned = True
            return anonymous(size)

    def _shared(self, size: int) -> mmap.mmap:
        descriptor = os.memfd_create(self.name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
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

    def vector(self, size: int) -> torch.Tensor:
        """Make memory as a tensor of bytes, shape (size,)."""
        return _bytes(self(size))[: max(size, 1)]  # a mapping has whole pages

    def descriptor(self, vector: torch.Tensor) -> int | None:
        """The descriptor of the segment at whose start a vector lies; None where it lies elsewhere."""
        return self._descriptors.get(vector.data_ptr())

    def handle(self, vector: torch.Tensor) -> SegmentHandle | None:
        """The handle of a vector that lies in a segment, at its start or not; None where it lies elsewhere."""
        start = vector.untyped_storage().data_ptr()
        descriptor = self._descriptors.get(start)
        if descriptor is None:
            return None
        return SegmentHandle(pid=self.pid, name=self.name, descriptor=descriptor, offset=vector.data_ptr() - start)

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)  # the memory itself exists as long as a tensor that shares it


def attach(handle: SegmentHandle, size: int) -> torch.Tensor:
    """Map bytes of another process's segment for reading, shape (size,). Writing to them ends this process.

    Raises:
        OSError: it is not there, not readable, too small, or not what was meant: the other process is on another machine.
    """
    place, expected = f"/proc/{handle.pid}/fd/{handle.descriptor}", f"/memfd:{handle.name} (deleted)"
    if str(Path(place).readlink()) != expected:  # checked before, too, since merely opening some things has effects
        raise FileNotFoundError(f"{place} is not the segment that was meant")
    end = handle.offset + size
    opened = os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)  # a FIFO by now would block
    try:
        if str(Path(f"/proc/self/fd/{opened}").readlink()) != expected:
            raise FileNotFoundError(f"{place} is not the segment that was meant")
        if not fcntl.fcntl(opened, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK or os.fstat(opened).st_size < end:
            raise OSError(f"{place} is too small, or its size can change")
        whole = mmap.mmap(opened, max(end, 1), flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ)
        return _bytes(whole)[handle.offset : end]
    finally:
        os.close(opened)


def not_shared(error: OSError) -> str:
    """The reason why a segment could not be attached, in the words of a user."""
    if isinstance(error, FileNotFoundError):
        return "another machine: no shared memory"
    return f"no shared memory: {error.strerror or error}"


def _bytes(memory: mmap.mmap) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # it is not meant to be
        return torch.frombuffer(memory, dtype=torch.uint8)
