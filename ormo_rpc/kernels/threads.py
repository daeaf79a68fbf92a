"""A step by several threads, each for a part of the vectors: compiled steps where ``runtime.threads`` is above 1."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from ormo_rpc.kernels.steps import CHUNK, Steps

LEAST = 16 * CHUNK
"""Elements for each thread below which handing a part over costs more than it saves."""


class Threaded:
    """`Steps` by several threads; the bits are those of one.

    Args:
        steps: What each thread does; it must let go of the interpreter's lock meanwhile, as C and torch operations do.
        threads: How many, the caller's among them.
    """

    def __init__(self, steps: Steps, threads: int) -> None:
        self.steps = steps
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads - 1, thread_name_prefix="step") if threads > 1 else None

    def plain(self, grad: Tensor, w: Tensor, out: Tensor, *, into_w: float) -> None:
        """See `Steps.plain`."""
        self._divide(lambda *part: self.steps.plain(*part, into_w=into_w), grad, w, out)

    def heavy(self, grad: Tensor, u: Tensor, w: Tensor, out: Tensor, *, beta: float, into_u: float) -> None:
        """See `Steps.heavy`."""
        self._divide(lambda *part: self.steps.heavy(*part, beta=beta, into_u=into_u), grad, u, w, out)

    def ordered(
        self,
        grad: Tensor,
        u: Tensor,
        w: Tensor,
        out: Tensor,
        *,
        scale: float,
        shifts: int,
        beta: float,
        into_u: float,
        into_w: float,
    ) -> None:
        """See `Steps.ordered`."""

        def step(*part: Tensor) -> None:
            self.steps.ordered(*part, scale=scale, shifts=shifts, beta=beta, into_u=into_u, into_w=into_w)

        self._divide(step, grad, u, w, out)

    def _divide(self, step: Callable[..., None], *vectors: Tensor) -> None:
        """Call the step for parts that begin at a multiple of the chunk, and return when all are done."""
        length = vectors[0].numel()
        parts = min(self.threads, length // LEAST)
        if self._pool is None or parts < 2:
            step(*vectors)
            return
        bounds = [part * length // parts // CHUNK * CHUNK for part in range(parts)] + [length]
        pieces = [[vector[low:high] for vector in vectors] for low, high in itertools.pairwise(bounds)]
        others = [self._pool.submit(step, *piece) for piece in pieces[1:]]
        try:
            step(*pieces[0])
        finally:
            for other in others:
                other.result()
