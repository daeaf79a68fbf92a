"""Checks of a push's payload: pure, so that they run before the lock is taken."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ormo_rpc.errors import NonFiniteGradient, PushRefused
from ormo_rpc.messages import Push


def check_payload(push: Push, params: Tensor, buffers: Mapping[str, Tensor], vectors: int = 1) -> float:
    """Refuse a push whose tensors cannot be applied; return the sum of its gradient, the evidence that the trace keeps.

    Args:
        push: What came.
        params: The server's parameters, shape (D,); only shape, dtype and device are looked at.
        buffers: The server's buffers by name, likewise.
        vectors: How many vectors of D the rule takes in a push.

    Raises:
        PushRefused: a tensor of another shape, dtype or device, or a buffer missing or unknown.
        NonFiniteGradient: NaN or infinity in the gradient, a buffer or the loss.
    """
    sender = f"push of worker {push.worker} for ticket {push.ticket}"
    _check_like(push.grad, params, f"{sender}: gradient", vectors)
    if push.buffers.keys() != buffers.keys():
        got, expected = sorted(push.buffers), sorted(buffers)
        raise PushRefused(f"{sender}: got the buffers {got}, expected {expected}; server and worker must build the same model")
    grad_sum = _check_finite(push.grad, f"{sender}: gradient")
    for name, value in push.buffers.items():
        _check_like(value, buffers[name], f"{sender}: buffer {name!r}")
        _check_finite(value, f"{sender}: buffer {name!r}")
    if push.loss is not None and not math.isfinite(push.loss):
        raise NonFiniteGradient(f"{sender}: loss: got {push.loss}, expected a finite number; the learning rate may be too high")
    if push.samples < 1:
        raise PushRefused(f"{sender}: samples: got {push.samples}, expected at least 1")
    return grad_sum


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite: one sum, and a closer look only where that sum is not finite."""
    return math.isfinite(values.sum().item()) or bool(torch.isfinite(values).all())


def _check_like(got: Tensor, expected: Tensor, what: str, vectors: int = 1) -> None:
    shape = expected.shape if vectors == 1 else torch.Size([vectors * expected.numel()])
    pairs = {"shape": (got.shape, shape), "dtype": (got.dtype, expected.dtype), "device": (got.device, expected.device)}
    for attribute, (came, wanted) in pairs.items():
        if came != wanted:
            raise PushRefused(
                f"{what}: got {attribute} {_plain(came)}, expected {_plain(wanted)}, as the server's parameters have it"
            )


def _check_finite(values: Tensor, what: str) -> float:
    total = values.sum().item()
    if not math.isfinite(total) and not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).sum())
        raise NonFiniteGradient(
            f"{what}: got {bad} of {values.numel()} values NaN or infinite, expected finite numbers; lower the learning rate"
        )
    return float(total)


def _plain(value: object) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)
