"""Steps divided among threads: for compiled steps where ``runtime.threads`` is above 1."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import torch
from typing_extensions import override

from ormo_rpc.kernels.steps import CHUNK, Step, Steps

LEAST = 16 * CHUNK
"""Smallest part worth a thread, in elements."""


class Threaded(Steps):
    """Divides each step among threads, in parts that begin at a multiple of the chunk; the bits are those of one thread.

    Args:
        steps: Takes the step on each part, and releases the interpreter's lock meanwhile, as C and torch operations do.
        threads: Number of threads, the caller's among them.
    """

    def __init__(self, steps: Steps, threads: int) -> None:
        self.steps = steps
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads - 1, thread_name_prefix="step") if threads > 1 else None

    @override
    def __call__(
        self,
        step: Step,
        grad: torch.Tensor,
        u: torch.Tensor | None,
        w: torch.Tensor,
        out: torch.Tensor,
        out_16bit: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
    ) -> None:
        length = w.numel()
        parts = min(self.threads, length // LEAST)
        if self._pool is None or parts < 2:
            self.steps(step, grad, u, w, out, out_16bit, v)
            return

        def take(start: int, end: int) -> None:
            part = slice(start, end)
            self.steps(
                step,
                grad[part],
                None if u is None else u[part],
                w[part],
                out[part],
                None if out_16bit is None else out_16bit[part],
                None if v is None else v[part],
            )

        bounds = [part * length // parts // CHUNK * CHUNK for part in range(parts)] + [length]
        (first, *rest) = itertools.pairwise(bounds)
        others = [self._pool.submit(take, *piece) for piece in rest]
        try:
            take(*first)
        finally:
            for other in others:
                other.result()
