"""Buffers for new parameters, used again when nobody can see the old ones any more."""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
WORTH_POOLING = 256 << 10
"""Bytes below which fresh memory is as good, since `malloc` has it at hand."""

Memory = Any
"""Anything with the buffer protocol, writable: a ``mmap``, a ``bytearray``."""

_NUMPY: dict[torch.dtype, Any] = {torch.float32: numpy.float32, torch.float64: numpy.float64, torch.bfloat16: numpy.int16}
"""A numpy type of that size; numpy has no bfloat16."""


class Pool:
    """Lends vectors of D; a vector's memory comes back when the last tensor that shares it is gone.

    Nobody has to give anything back, so nobody can do so too early: each loan is a new array over the same memory; torch holds
    the array for as long as any tensor, view or message on its way shares it, and the array's end returns the memory.

    Args:
        dimension: D.
        dtype: float32, float64 or bfloat16.
        memory: Makes memory for that many bytes, aligned to 64.
    """

    def __init__(self, dimension: int, dtype: torch.dtype, memory: Callable[[int], Memory] | None = None) -> None:
        self.dimension = dimension
        self.dtype = dtype
        self.made: list[Memory] = []
        """All memories, in the order in which they were made."""
        self._memory = memory or anonymous
        self._free: deque[int] = deque()  # appended to by the end of an array, in whatever thread that is: no lock is needed
        self._lent: dict[int, weakref.ref[Any]] = {}

    def take(self) -> Tensor:
        """A vector, shape (D,), that nobody else sees; what is in it means nothing."""
        try:
            number = self._free.pop()  # the last one that came back, which the caches may still have
        except IndexError:
            number = len(self.made)
            self.made.append(self._memory(self.dimension * self.dtype.itemsize))
        array = numpy.frombuffer(self.made[number], dtype=_NUMPY[self.dtype], count=self.dimension)
        self._lent[number] = weakref.ref(array, lambda _: self._free.append(number))
        vector = torch.from_numpy(array)
        return vector if vector.dtype is self.dtype else vector.view(self.dtype)

    @property
    def lent(self) -> int:
        """How many vectors somebody still sees."""
        return len(self.made) - len(self._free)


def pooled(memory: Callable[[int], Memory] | None = None) -> Callable[[Tensor], Tensor]:
    """Makes vectors from pools, one pool for each D and dtype; what is small or not on the CPU is fresh memory.

    The pools hold as many vectors as were ever seen at once, and free none of them.

    Args:
        memory: See `Pool`.
    """
    pools: dict[tuple[int, torch.dtype], Pool] = {}

    def empty(like: Tensor) -> Tensor:
        if like.device.type != "cpu" or like.numel() * like.element_size() < WORTH_POOLING:
            return torch.empty_like(like)
        key = (like.numel(), like.dtype)
        if key not in pools:
            pools[key] = Pool(*key, memory)
        return pools[key].take()

    return empty


def anonymous(size: int) -> Memory:
    """Memory of this process alone, on huge pages where it is large and the system lets us.

    The pages are there when this returns, so the first one to write pays no faults; a fresh 100 MB costs three times its copy.
    """
    memory = mmap.mmap(-1, max(size, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= HUGE_PAGE:
        memory.madvise(mmap.MADV_HUGEPAGE)
    numpy.frombuffer(memory, dtype=numpy.uint8)[:: mmap.PAGESIZE] = 0
    return memory
