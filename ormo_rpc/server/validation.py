"""Checks of a push: pure, so that they run before the lock is taken. Nothing of it is trusted, its types included."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from ormo_rpc.errors import GradientTooLarge, NonFiniteGradient, PushRefused
from ormo_rpc.messages import Push

LARGEST = 2**53
"""Up to here a whole number is the same in JSON, in a float and in every counter of ours."""
ROW = 4096
"""How many 16-bit values are summed to a sum that is rounded to 16 bits itself."""


class NormPolicy(Enum):
    """Treatment of a push whose norm is above the limit."""

    clip = "clip"
    """It is scaled down to the limit."""
    refuse = "refuse"
    """It is settled like one that is not finite: its ticket goes to another worker."""


@dataclass(frozen=True, slots=True)
class NormLimit:
    """A limit to the global norm of a push, for most algorithms a gradient with its weight decay.

    Attributes:
        limit: The largest norm that is applied as it comes.
        policy: Treatment of a larger one.
    """

    limit: float
    policy: NormPolicy = NormPolicy.clip


@dataclass(frozen=True, slots=True)
class ValidatedPush:
    """The outcome of `ParameterServer.validate`, for `ParameterServer.commit`.

    Attributes:
        grad: The gradient to apply: the one that came, or that scaled down; detached.
        grad_sum: The sum of the one that came, which the trace keeps as evidence.
        clipped_norm: The norm of the one that came, where it was scaled down.
        rejected: Why the gradient is not applied: it is not finite, or too large for a limit that refuses. The push is settled
            all the same: its ticket goes to another worker and its sender gets new work.
    """

    grad: Tensor
    grad_sum: float
    clipped_norm: float | None = None
    rejected: NonFiniteGradient | None = None


def validate_push(
    push: Push,
    params: Tensor,
    buffers: Mapping[str, Tensor],
    vectors: int = 1,
    guard: NormLimit | None = None,
    dtype: torch.dtype | None = None,
) -> ValidatedPush:
    """Refuse a push that cannot be applied, whoever holds its ticket.

    Args:
        push: The push.
        params: The server's parameters, shape (D,); only shape, dtype and device are looked at.
        buffers: The server's buffers by name, looked at in the same way.
        vectors: The number of vectors of D in a push of this algorithm.
        guard: The limit to its norm.
        dtype: The dtype of the gradient on the wire; by default the parameters'.

    Raises:
        PushRefused: a field of another type, a tensor of another shape, dtype or device, or a buffer missing or unknown.
        NonFiniteGradient: NaN or infinity in the gradient, a buffer or the loss.
        GradientTooLarge: the norm is above a limit that refuses.
    """
    _check_fields(push)
    sender = f"push of worker {push.worker} for ticket {push.ticket}"
    _check_like(push.grad, params, f"{sender}: gradient", vectors, dtype)
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
    checked = ValidatedPush(push.grad.detach(), grad_sum)
    return checked if guard is None else _guarded(checked, guard, params.dtype, f"{sender}: gradient")


def check_whole(value: object, what: str, error: type[ValueError] = PushRefused) -> None:
    """Refuse anything but a whole number of up to 53 bits; a bool is none.

    Raises:
        ValueError: of the class ``error``.
    """
    if type(value) is not int:
        raise error(f"{what}: got a {type(value).__name__}, expected a whole number")
    if abs(value) > LARGEST:
        raise error(f"{what}: got a number of {value.bit_length()} bits, expected one of at most 53")


def check_plain(value: object, what: str) -> None:
    """Refuse anything but an ordinary dense tensor wholly within its storage, which one in a forged message may exceed.

    Raises:
        PushRefused: it is something else.
    """
    if type(value) not in (Tensor, nn.Parameter):
        raise PushRefused(f"{what}: got a {type(value).__name__}, expected a tensor")
    assert isinstance(value, Tensor)
    named = any(getattr(value, "names", ()))  # not every version of torch has names
    if value.layout is not torch.strided or value.is_nested or named:
        kind = "nested" if value.is_nested else "named" if named else str(value.layout)
        raise PushRefused(f"{what}: got a {kind} tensor, expected a plain dense one")
    if value.device.type == "meta" or value.is_quantized or value.numel() == 0:
        return  # without memory of its own, or of a dtype that is refused
    places = list(zip(value.shape, value.stride(), strict=True))
    last = value.storage_offset() + sum((size - 1) * step for size, step in places)
    inside = value.storage_offset() >= 0 and all(step >= 0 for _, step in places)
    if not inside or (last + 1) * value.element_size() > value.untyped_storage().nbytes():
        raise PushRefused(f"{what}: got a tensor that reaches beyond its memory, expected a whole one")


def all_finite(values: Tensor) -> bool:
    """Tell if no value is NaN or infinite: one sum, and a pass over the elements only where that sum is not finite."""
    return math.isfinite(values.sum().item()) or bool(torch.isfinite(values).all())


def _check_fields(push: Push) -> None:
    """Check the type of every field, so that later checks can neither fail otherwise nor take True for 1."""
    if type(push) is not Push:
        raise PushRefused(f"push: got a {type(push).__name__}, expected a Push")
    for name in ("worker", "ticket", "stamp", "incarnation", "samples"):
        value = getattr(push, name)
        if type(value) is not int or abs(value) > LARGEST:
            check_whole(value, f"push: {name}")
    if push.loss is not None and type(push.loss) is not float:
        check_whole(push.loss, "push: loss")
    if not isinstance(push.buffers, Mapping) or not all(type(name) is str for name in push.buffers):  # pyright: ignore[reportUnnecessaryIsInstance] # it came from elsewhere
        raise PushRefused(f"push: buffers: got a {type(push.buffers).__name__}, expected tensors by name")


def _check_like(got: Tensor, expected: Tensor, what: str, vectors: int = 1, other_dtype: torch.dtype | None = None) -> None:
    check_plain(got, what)
    dtype = other_dtype or expected.dtype
    if vectors == 1 and got.shape == expected.shape and got.dtype is dtype and got.device == expected.device:
        return
    shape = expected.shape if vectors == 1 else torch.Size([vectors * expected.numel()])
    pairs = {"shape": (got.shape, shape), "dtype": (got.dtype, dtype), "device": (got.device, expected.device)}
    for attribute, (came, wanted) in pairs.items():
        if came != wanted:
            source = "the wire has" if attribute == "dtype" and other_dtype else "the server's parameters have"
            raise PushRefused(f"{what}: got {attribute} {_plain(came)}, expected {_plain(wanted)}, as {source} it")


def _total(values: Tensor) -> float:
    """The sum of all values. That of 16-bit ones is put together of the sums of rows, as torch rounds a sum to their bits.

    In 16 bits a change of one value of a long vector could be lost; to sum in 32, torch widens the whole vector first.
    """
    if values.element_size() > 2:
        return float(values.sum().item())
    whole = values.numel() // ROW * ROW
    return (values[:whole].reshape(whole // ROW, ROW).sum(1).float().sum() + values[whole:].sum()).item()


def _check_finite(values: Tensor, what: str) -> float:
    total = _total(values)
    if math.isfinite(total):
        return total
    if not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).sum())
        raise NonFiniteGradient(
            f"{what}: got {bad} of {values.numel()} values NaN or infinite, expected finite numbers; lower the learning rate"
        )
    # A row of float16 values of 16 and more may have a sum beyond their range, and two such rows NaN, which tells nothing.
    return total if values.element_size() > 2 else float(values.double().sum().item())


def _guarded(checked: ValidatedPush, guard: NormLimit, dtype: torch.dtype, what: str) -> ValidatedPush:
    """Look at the norm, to which there is a limit; one that overflows is found through the vector over its largest value.

    What is scaled down is of the parameters' ``dtype``, so that it is not rounded once more.
    """
    grad = checked.grad
    if torch.linalg.vector_norm(grad, dtype=torch.float64).item() <= guard.limit:
        return checked
    largest = grad.abs().max().item()
    unit = grad.to(dtype) / largest
    unit_norm = torch.linalg.vector_norm(unit, dtype=torch.float64).item()
    norm = largest * unit_norm
    if guard.policy is NormPolicy.refuse:
        raise GradientTooLarge(
            f"{what}: got the norm {norm:g}, expected at most train.grad_norm_limit={guard.limit:g}; lower the learning rate"
        )
    return ValidatedPush(unit.mul_(guard.limit / unit_norm), checked.grad_sum, norm)


def _plain(value: object) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)
