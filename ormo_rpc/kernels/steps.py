"""What a step of the server is: one pass that reads a gradient and the state, and writes the state and new parameters."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

CHUNK = 65_536
"""Elements worked on at a time: the operands of a step, 5 x 256 KiB, stay in the second-level cache between its operations."""
WORTH_CUTTING = 16 * CHUNK
"""Elements below which the cutting costs more than the cache saves."""


class Plain(NamedTuple):
    """``out <- w - into_w g``; there is no ``u``."""

    into_w: float


class Heavy(NamedTuple):
    """``u <- beta u + into_u g; out <- w - u``."""

    beta: float
    into_u: float


class Ordered(NamedTuple):
    """``u <- scale u``; ``shifts`` times ``w <- w - beta u; u <- beta u``; ``u <- u + into_u g; out <- w - into_w g``."""

    scale: float
    shifts: int
    beta: float
    into_u: float
    into_w: float


Step = Plain | Heavy | Ordered
"""Which recursion, and its numbers."""


class Steps(Protocol):
    """Takes steps. Every implementation gives the same bits, however the vectors are divided."""

    def __call__(self, step: Step, grad: Tensor, u: Tensor | None, w: Tensor, out: Tensor, low: Tensor | None = None) -> None:
        """Take a step.

        Args:
            step: Which one.
            grad: ``g``, shape (D,), of the dtype of ``w``, or bfloat16 or float16, which are widened first.
            u: The momentum, shape (D,), of the dtype of ``w``, updated in place; None for `Plain`.
            w: The parameters, shape (D,), float32 or float64. They are only read, so that they may go on being the snapshot
                that others read, and no copy of them is ever made.
            out: Where the new parameters are written, shape (D,), of the dtype of ``w``.
            low: Where they are written once more, shape (D,), rounded to bfloat16; None for nowhere.
        """
        ...


class TorchSteps:
    """`Steps` in torch operations, chunk by chunk."""

    def __call__(self, step: Step, grad: Tensor, u: Tensor | None, w: Tensor, out: Tensor, low: Tensor | None = None) -> None:
        """See `Steps`."""
        for grad_c, u_c, w_c, out_c, low_c in _chunks(grad, u, w, out, low):
            _take(step, grad_c.to(w.dtype), u_c, w_c, out_c)
            if low_c is not None:
                low_c.copy_(out_c)


def _take(step: Step, grad: Tensor, u: Tensor | None, w: Tensor, out: Tensor) -> None:
    if isinstance(step, Plain):
        torch.sub(w, grad, alpha=step.into_w, out=out)
        return
    assert u is not None, f"{step} has a momentum"
    if isinstance(step, Heavy):
        u.mul_(step.beta).add_(grad, alpha=step.into_u)
        torch.sub(w, u, out=out)
        return
    if step.scale != 1.0:
        u.mul_(step.scale)
    before = w
    for _ in range(step.shifts):
        torch.sub(before, u, alpha=step.beta, out=out)
        u.mul_(step.beta)
        before = out
    u.add_(grad, alpha=step.into_u)
    torch.sub(before, grad, alpha=step.into_w, out=out)


Operands = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]
"""Of a step: ``grad, u, w, out, low``."""


def _chunks(grad: Tensor, u: Tensor | None, w: Tensor, out: Tensor, low: Tensor | None) -> Iterable[Operands]:
    """The operands piece by piece, as one piece where they are short."""
    if w.numel() < WORTH_CUTTING:
        return [(grad, u, w, out, low)]
    absent = itertools.repeat(None)
    us, lows = (absent if vector is None else vector.split(CHUNK) for vector in (u, low))
    return zip(grad.split(CHUNK), us, w.split(CHUNK), out.split(CHUNK), lows, strict=False)  # what is absent has no end
