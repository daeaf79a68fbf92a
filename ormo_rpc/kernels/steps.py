"""What a step of the server is: one pass that reads a gradient and the state, and writes the state and new parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

CHUNK = 65_536
"""Elements worked on at a time: the operands of a step, 5 x 256 KiB, stay in the second-level cache between its operations."""
WORTH_CUTTING = 16 * CHUNK
"""Elements below which the cutting costs more than the cache saves."""


class Steps(Protocol):
    """Steps over vectors of D that are contiguous, of one dtype (float32 or float64), on the CPU.

    The parameters ``w`` are only read and ``out`` is written, so that ``w`` may go on being the snapshot that others read, and
    no copy of the parameters is ever made. ``u`` is updated in place. Every implementation gives the same bits, however the
    vectors are divided.
    """

    def plain(self, grad: Tensor, w: Tensor, out: Tensor, *, into_w: float) -> None:
        """``out <- w - into_w g``."""
        ...

    def heavy(self, grad: Tensor, u: Tensor, w: Tensor, out: Tensor, *, beta: float, into_u: float) -> None:
        """``u <- beta u + into_u g; out <- w - u``."""
        ...

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
        """``u <- scale u``; ``shifts`` times ``w <- w - beta u; u <- beta u``; ``u <- u + into_u g; out <- w - into_w g``."""
        ...


class TorchSteps:
    """`Steps` in torch operations, chunk by chunk."""

    def plain(self, grad: Tensor, w: Tensor, out: Tensor, *, into_w: float) -> None:
        """See `Steps.plain`."""
        torch.sub(w, grad, alpha=into_w, out=out)

    def heavy(self, grad: Tensor, u: Tensor, w: Tensor, out: Tensor, *, beta: float, into_u: float) -> None:
        """See `Steps.heavy`."""
        for g_c, u_c, w_c, out_c in _chunks(grad, u, w, out):
            u_c.mul_(beta).add_(g_c, alpha=into_u)
            torch.sub(w_c, u_c, out=out_c)

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
        for g_c, u_c, w_c, out_c in _chunks(grad, u, w, out):
            if scale != 1.0:
                u_c.mul_(scale)
            before = w_c
            for _ in range(shifts):
                torch.sub(before, u_c, alpha=beta, out=out_c)
                u_c.mul_(beta)
                before = out_c
            u_c.add_(g_c, alpha=into_u)
            torch.sub(before, g_c, alpha=into_w, out=out_c)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """What a server goes over its vectors with; whichever it is, the bits are the same.

    Attributes:
        name: For the header of the trace.
        steps: The steps of rules that work out of place.
        blank: Makes a vector like another one, which nobody else sees and in which nothing is meant.
    """

    name: str = "torch"
    steps: Steps = TorchSteps()
    blank: Callable[[Tensor], Tensor] = torch.empty_like


def _chunks(*vectors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    if vectors[0].numel() < WORTH_CUTTING:
        return [vectors]
    return zip(*(vector.split(CHUNK) for vector in vectors), strict=True)
