"""Memory for new parameters, reused when no tensor refers to the old ones any more."""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import torch

HUGE_PAGE = 2 << 20
WORTH_POOLING = 256 << 10
"""Number of bytes below which fresh memory is as fast, since `malloc` has it at hand."""

Memory = Any
"""Any writable object with the buffer protocol: a ``mmap``, a ``bytearray``."""

_NUMPY: Mapping[str, str] = {
    "torch.float32": "float32",
    "torch.float64": "float64",
    "torch.bfloat16": "int16",
    "torch.uint8": "uint8",
}
"""The name of numpy's type of the same size for that of each dtype; numpy has no bfloat16."""


class Pool:
    """Lends vectors of D; a vector's memory comes back when the last tensor that shares it is gone.

    There is no call to return a vector, so none can come too early. Each loan is a new array over the same memory; torch holds
    the array for as long as any tensor, view or message in flight shares it, and a weak reference notices its end.

    Args:
        dimension: D.
        dtype: float32, float64, bfloat16 or uint8.
        memory: Allocates a number of bytes, aligned to 64; by default `anonymous`.
    """

    def __init__(self, dimension: int, dtype: torch.dtype, memory: Callable[[int], Memory] | None = None) -> None:
        self.dimension = dimension
        self.dtype = dtype
        self.made: list[Memory] = []
        """All memory, in the order of allocation."""
        self._memory = memory or anonymous
        self._free: deque[int] = deque()  # an array may end in any thread; append and pop need no lock
        self._lent: dict[int, weakref.ref[Any]] = {}

    def take(self) -> torch.Tensor:
        """Lend an uninitialised vector, shape (D,), that nothing else shares."""
        try:
            number = self._free.pop()  # the one returned last, which may still be in the caches
        except IndexError:
            number = len(self.made)
            self.made.append(self._memory(self.dimension * self.dtype.itemsize))
        array = numpy.frombuffer(self.made[number], dtype=_NUMPY[str(self.dtype)], count=self.dimension)
        self._lent[number] = weakref.ref(array, lambda _: self._free.append(number))
        vector = torch.from_numpy(array)
        return vector if vector.dtype is self.dtype else vector.view(self.dtype)

    @property
    def lent(self) -> int:
        """The number of vectors that are lent at the moment."""
        return len(self.made) - len(self._free)


def pooled(memory: Callable[[int], Memory] | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a replacement of `torch.empty_like` that takes its vectors from pools, one for each D and dtype.

    Small vectors, and those not on the CPU, are fresh memory. A pool grows to the largest number of vectors lent at once and is
    freed with the returned function.

    Args:
        memory: See `Pool`.
    """
    pools: dict[tuple[int, torch.dtype], Pool] = {}

    def empty(like: torch.Tensor) -> torch.Tensor:
        if like.device.type != "cpu" or like.numel() * like.element_size() < WORTH_POOLING:
            return torch.empty_like(like)
        key = (like.numel(), like.dtype)
        if key not in pools:
            pools[key] = Pool(*key, memory)
        return pools[key].take()

    return empty


def anonymous(size: int) -> Memory:
    """Map private memory, on huge pages where it is large and the system allows them.

    All pages are touched here, so that no step pays for page faults: a fresh 100 MB costs three times its copy.
    """
    memory = mmap.mmap(-1, max(size, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= HUGE_PAGE:
        memory.madvise(mmap.MADV_HUGEPAGE)
    numpy.frombuffer(memory, dtype=numpy.uint8)[:: mmap.PAGESIZE] = 0
    return memory
