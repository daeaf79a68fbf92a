"""Steps of the server: one pass that reads a gradient and the state, and writes the state and the new parameters."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple, Protocol, TypeAlias

import torch
from typing_extensions import override

CHUNK = 65_536
"""Elements of a chunk: the operands of a step, 5 x 256 KiB, stay in the second-level cache between its operations."""
WORTH_CUTTING = 16 * CHUNK
"""Number of elements below which chunks cost more than the cache saves."""


class SGDStep(NamedTuple):
    """``out <- w - w_scale g``; there is no ``u``."""

    w_scale: float


class HeavyBallStep(NamedTuple):
    """``u <- beta u + u_scale g; out <- w - u``."""

    beta: float
    u_scale: float


class OrMoStep(NamedTuple):
    """``u <- scale u``; ``shifts`` times ``w <- w - beta u; u <- beta u``; ``u <- u + u_scale g; out <- w - w_scale g``."""

    scale: float
    shifts: int
    beta: float
    u_scale: float
    w_scale: float


class AdamWStep(NamedTuple):
    """``u <- u + weight1 (g / divisor - u); v <- beta2 v + weight2 (g / divisor)^2``, then the move of the parameters.

    ``out <- decay w - size u / (sqrt(v) / root + eps)``, in the operations of ``torch.optim.AdamW``.
    """

    divisor: float
    weight1: float
    beta2: float
    weight2: float
    decay: float
    size: float
    root: float
    eps: float


Step = SGDStep | HeavyBallStep | OrMoStep | AdamWStep
"""A recursion with its numbers."""


class Steps(Protocol):
    """An implementation of steps. All give the same bits, however the vectors are divided."""

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
        """Take a step.

        Args:
            step: The recursion and its numbers.
            grad: ``g``, shape (D,), of the dtype of ``w``, or bfloat16 or float16, which are widened first.
            u: The momentum, shape (D,), of the dtype of ``w``, updated in place; None for `SGDStep`.
            w: The parameters, shape (D,), float32 or float64. They are only read, and so serve others as a snapshot without
                a copy; they may be ``out`` itself.
            out: Receives the new parameters, shape (D,), of the dtype of ``w``.
            out_16bit: Receives them rounded to bfloat16, shape (D,), if given.
            v: The second moment, shape (D,), of the dtype of ``w``, updated in place; for `AdamWStep` alone.
        """
        ...


class TorchSteps(Steps):
    """Steps in torch operations, chunk by chunk; on a GPU in whole vectors, with the roundings of its kernels of torch."""

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
        for grad_c, u_c, w_c, out_c, out_16bit_c, v_c in _chunks(grad, u, w, out, out_16bit, v):
            _take(step, grad_c.to(w.dtype), u_c, w_c, out_c, v_c)
            if out_16bit_c is not None:
                out_16bit_c.copy_(out_c)


def _take(
    step: Step, grad: torch.Tensor, u: torch.Tensor | None, w: torch.Tensor, out: torch.Tensor, v: torch.Tensor | None
) -> None:
    if isinstance(step, SGDStep):
        torch.sub(w, grad, alpha=step.w_scale, out=out)
        return
    assert u is not None, f"{step} has a momentum"
    if isinstance(step, HeavyBallStep):
        u.mul_(step.beta).add_(grad, alpha=step.u_scale)
        torch.sub(w, u, out=out)
        return
    if isinstance(step, AdamWStep):
        assert v is not None, f"{step} has a second moment"
        if step.divisor != 1.0:
            grad = grad / step.divisor
        u.lerp_(grad, step.weight1)
        v.mul_(step.beta2).addcmul_(grad, grad, value=step.weight2)
        torch.mul(w, step.decay, out=out)
        out.addcdiv_(u, v.sqrt().div_(step.root).add_(step.eps), value=-step.size)
        return
    if step.scale != 1.0:
        u.mul_(step.scale)
    before = w
    for _ in range(step.shifts):
        torch.sub(before, u, alpha=step.beta, out=out)
        u.mul_(step.beta)
        before = out
    u.add_(grad, alpha=step.u_scale)
    torch.sub(before, grad, alpha=step.w_scale, out=out)


Operands: TypeAlias = (
    "tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]"
)
"""The vectors of a step: ``grad, u, w, out, out_16bit, v``."""


def _chunks(
    grad: torch.Tensor,
    u: torch.Tensor | None,
    w: torch.Tensor,
    out: torch.Tensor,
    out_16bit: torch.Tensor | None,
    v: torch.Tensor | None,
) -> Iterable[Operands]:
    """Divide the operands into chunks for the caches of a processor; short ones, and those of a GPU, are a single chunk."""
    if w.numel() < WORTH_CUTTING or w.device.type != "cpu":
        return [(grad, u, w, out, out_16bit, v)]
    absent = itertools.repeat(None)
    us, outs_16bit, vs = (absent if vector is None else vector.split(CHUNK) for vector in (u, out_16bit, v))
    # What is absent has no end.
    return zip(grad.split(CHUNK), us, w.split(CHUNK), out.split(CHUNK), outs_16bit, vs, strict=False)
