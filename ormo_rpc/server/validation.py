"""Checks of a push: pure functions, so that they run before the lock is taken. Nothing in a push is trusted, not even types."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

import torch

from ormo_rpc.errors import GradientTooLarge, NonFiniteGradient, PushRefused
from ormo_rpc.messages import Push
from ormo_rpc.server.buffer_layout import PackedTensors
from ormo_rpc.server.buffer_rules import Rule, RuleKind
from ormo_rpc.server.buffers import RunningBuffers
from ormo_rpc.server.packed_buffers import MOST_CALLS, Reported
from ormo_rpc.server.push_metrics import check_push_metrics

LARGEST = 2**53
"""The largest whole number that JSON, a float64 and the counters of the server all hold exactly."""
ROW = 4096
"""The number of 16-bit values in a partial sum, which is rounded to 16 bits itself."""


class NormPolicy(Enum):
    """Treatment of a push whose norm is above the limit."""

    clip = "clip"
    """The push is scaled down to the limit."""
    refuse = "refuse"
    """The push is settled like one that is not finite: its ticket goes to another worker."""


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
        grad: The gradient to apply, detached, on the server's device: as pushed, or scaled down.
        grad_sum: The sum of the gradient as pushed, which the trace keeps as evidence.
        clipped_norm: The norm of the gradient as pushed, where it was scaled down.
        rejected: The reason not to apply the gradient: it is not finite, or too large for a limit that refuses. The push is
            settled all the same: its ticket goes to another worker and its sender gets new work.
        buffers: What enters of its buffers, on the server's device.
    """

    grad: torch.Tensor
    grad_sum: float
    clipped_norm: float | None = None
    rejected: NonFiniteGradient | None = None
    buffers: Mapping[str, torch.Tensor] | Reported = field(default_factory=dict[str, "torch.Tensor"])

    def tensors(self) -> list[torch.Tensor]:
        """All tensors that a commit reads."""
        return [self.grad, *([self.buffers.flat] if isinstance(self.buffers, Reported) else self.buffers.values())]


def validate_push(
    push: Push,
    params: torch.Tensor,
    buffers: RunningBuffers,
    vectors: int = 1,
    norm_limit: NormLimit | None = None,
    dtype: torch.dtype | None = None,
) -> ValidatedPush:
    """Check everything about a push that does not depend on the assignments.

    What lies elsewhere is copied to the server's device, in the stream of the caller, who has waited for it when this returns.

    Args:
        push: The push.
        params: The server's parameters, shape (D,); only shape, dtype and device are read.
        buffers: The server's buffers, read in the same way.
        vectors: The number of vectors of D in a push of this algorithm.
        norm_limit: The limit to its norm.
        dtype: The dtype of the gradient on the wire; by default the parameters'.

    Raises:
        PushRefused: a field of another type, a tensor of another shape, dtype or device, or a buffer that cannot be.
        NonFiniteGradient: NaN or infinity in the gradient, in statistics of a batch norm or the loss.
        GradientTooLarge: the norm is above a limit that refuses.
    """
    _check_fields(push)
    sender = f"push of worker {push.worker} for ticket {push.ticket}"
    _check_like(push.grad, params, f"{sender}: gradient", vectors, dtype)
    if not push.buffers.keys() <= buffers.current.keys():
        got, expected = sorted(push.buffers), sorted(buffers.current)
        raise PushRefused(
            f"{sender}: got the buffers {got}, expected of {expected}; server and worker must build the same model"
        )
    grad = _there(push.grad.detach(), params.device)
    entering = buffers.select(push.buffers) if push.buffers else push.buffers
    if isinstance(entering, Reported):
        total, possible = entering.read(_sum(grad))
        grad_sum = _check_finite(grad, f"{sender}: gradient", total)
        entering = entering if possible else None
    else:
        grad_sum = _check_finite(grad, f"{sender}: gradient")
    if entering is None:
        entering = _check_buffers(push.buffers, buffers, sender)
    if push.loss is not None and not math.isfinite(push.loss):
        raise NonFiniteGradient(f"{sender}: loss: got {push.loss}, expected a finite number; the learning rate may be too high")
    if push.samples < 1:
        raise PushRefused(f"{sender}: samples: got {push.samples}, expected at least 1")
    validated = ValidatedPush(grad, grad_sum, buffers=entering)
    return validated if norm_limit is None else _limited(validated, norm_limit, params.dtype, f"{sender}: gradient")


def check_whole(value: object, what: str, error: type[ValueError] = PushRefused) -> None:
    """Refuse anything but a whole number of up to 53 bits; a bool is not one.

    Raises:
        ValueError: of the class ``error``.
    """
    if type(value) is not int:
        raise error(f"{what}: got a {type(value).__name__}, expected a whole number")
    if abs(value) > LARGEST:
        raise error(f"{what}: got a number of {value.bit_length()} bits, expected one of at most 53")


def check_plain(value: object, what: str) -> None:
    """Refuse anything but an ordinary dense tensor within its storage; one from a forged message may reach beyond it.

    Raises:
        PushRefused: it is something else.
    """
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        raise PushRefused(f"{what}: got a {type(value).__name__}, expected a tensor")
    assert isinstance(value, torch.Tensor)
    named = any(getattr(value, "names", ()))  # not every version of torch has names
    if value.layout is not torch.strided or value.is_nested or named:
        kind = "nested" if value.is_nested else "named" if named else str(value.layout)
        raise PushRefused(f"{what}: got a {kind} tensor, expected a plain dense one")
    if value.device.type == "meta" or value.is_quantized or value.numel() == 0:
        return  # it has no memory of its own, or a dtype that is refused later
    start = value.storage_offset()
    if value.is_contiguous():
        end, inside = start + value.numel(), start >= 0
    else:
        places = list(zip(value.shape, value.stride(), strict=True))
        end = start + sum((size - 1) * step for size, step in places) + 1
        inside = start >= 0 and all(step >= 0 for _, step in places)
    if not inside or end * value.element_size() > value.untyped_storage().nbytes():
        raise PushRefused(f"{what}: got a tensor that reaches beyond its memory, expected a whole one")


def all_finite(values: torch.Tensor) -> bool:
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
    if type(push.loss_scale) is not float:
        check_whole(push.loss_scale, "push: loss_scale")
    if push.loss is not None and type(push.loss) is not float:
        check_whole(push.loss, "push: loss")
    if type(push.buffers) is PackedTensors:  # made by our own decoder
        pass
    elif not isinstance(push.buffers, Mapping) or not all(type(name) is str for name in push.buffers):  # pyright: ignore[reportUnnecessaryIsInstance] # it came from elsewhere
        raise PushRefused(f"push: buffers: got a {type(push.buffers).__name__}, expected tensors by name")
    if type(push.metrics) is not dict or push.metrics:
        check_push_metrics(push.metrics, "push: metrics")


def _check_like(
    got: torch.Tensor, expected: torch.Tensor, what: str, vectors: int = 1, other_dtype: torch.dtype | None = None
) -> None:
    check_plain(got, what)
    dtype = other_dtype or expected.dtype
    if vectors == 1 and got.shape == expected.shape and got.dtype is dtype and got.device == expected.device:
        return
    shape = expected.shape if vectors == 1 else torch.Size([vectors * expected.numel()])
    device = expected.device if got.device.type == "meta" else got.device  # from everywhere else it is copied
    pairs = {"shape": (got.shape, shape), "dtype": (got.dtype, dtype), "device": (got.device, device)}
    for attribute, (came, wanted) in pairs.items():
        if came != wanted:
            source = "the wire has" if attribute == "dtype" and other_dtype else "the server's parameters have"
            raise PushRefused(f"{what}: got {attribute} {_plain(came)}, expected {_plain(wanted)}, as {source} it")


def _check_buffers(reported: Mapping[str, torch.Tensor], buffers: RunningBuffers, sender: str) -> Mapping[str, torch.Tensor]:
    """Check each buffer's form, and the values of all that follow one rule at once; one by one where these are refused.

    Returns:
        The buffers by name, on the server's device.
    """
    together: dict[tuple[RuleKind, bool, torch.dtype], tuple[Rule, list[torch.Tensor]]] = {}
    for name, value in reported.items():
        _check_like(value, buffers.current[name], f"{sender}: buffer {name!r}")
    if reported and buffers.device.type != "cpu":
        reported = {name: _there(value.detach(), buffers.device) for name, value in reported.items()}
    for name, value in reported.items():
        rule = buffers.rules[name]
        if rule.kind is not RuleKind.newest:
            together.setdefault((rule.kind, rule.variance, value.dtype), (rule, []))[1].append(value.flatten())
    try:
        for rule, values in together.values():
            _check_possible(torch.cat(values), rule, sender)
    except PushRefused:  # which one, and what of it
        for name, value in reported.items():
            _check_possible(value, buffers.rules[name], f"{sender}: buffer {name!r}")
    if reported and not together and buffers.device.type == "cuda":  # no value was looked at, which waits for the copies
        torch.cuda.current_stream(buffers.device).synchronize()
    return reported


def _there(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The values on the server's device; a copy of page-locked memory is only begun."""
    return values if values.device == device else values.to(device, non_blocking=values.device.type == "cpu")


def _check_possible(value: torch.Tensor, rule: Rule, what: str) -> None:
    """Check what is to be averaged or added; other buffers may have any value."""
    if rule.kind is RuleKind.average:
        _check_finite(value, what)
        if rule.variance and bool((value < 0).any()):
            raise PushRefused(f"{what}: got a negative variance, expected numbers >= 0")
    elif rule.kind is RuleKind.count and not bool(((value >= 0) & (value <= MOST_CALLS)).all()):
        raise PushRefused(f"{what}: got {value.tolist()} calls, expected a number from 0 to {MOST_CALLS}")


def _sum(values: torch.Tensor) -> torch.Tensor:
    """Sum all values, shape (); 16-bit ones in rows first, whose sums are added in 32 bits.

    torch rounds a sum to the dtype of the values: in 16 bits a change of one value in a long vector could be lost, and summing
    in 32 bits would widen the whole vector first.
    """
    if values.element_size() > 2:
        return values.sum()
    whole = values.numel() // ROW * ROW
    return values[:whole].reshape(whole // ROW, ROW).sum(1).float().sum() + values[whole:].sum()


def _check_finite(values: torch.Tensor, what: str, total: float | None = None) -> float:
    """Return the sum of the values, which is ``total`` where it is known, once they are known to be finite."""
    total = float(_sum(values).item()) if total is None else total
    if math.isfinite(total):
        return total
    if not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).sum())
        raise NonFiniteGradient(
            f"{what}: got {bad} of {values.numel()} values NaN or infinite, expected finite numbers; lower the learning rate"
        )
    # Finite float16 values can overflow in the sum of a row, and two such rows (inf - inf) give NaN.
    return total if values.element_size() > 2 else float(values.double().sum().item())


def _limited(validated: ValidatedPush, norm_limit: NormLimit, dtype: torch.dtype, what: str) -> ValidatedPush:
    """Apply the limit to the norm. A norm above it is measured after division by the largest value, so that it cannot overflow.

    A gradient that is scaled down gets the parameters' ``dtype``, so that it is not rounded once more.
    """
    grad = validated.grad
    if torch.linalg.vector_norm(grad, dtype=torch.float64).item() <= norm_limit.limit:
        return validated
    largest = grad.abs().max().item()
    unit = grad.to(dtype) / largest
    unit_norm = torch.linalg.vector_norm(unit, dtype=torch.float64).item()
    norm = largest * unit_norm
    if norm_limit.policy is NormPolicy.refuse:
        raise GradientTooLarge(
            f"{what}: got the norm {norm:g}, expected at most train.grad_norm_limit={norm_limit.limit:g}; "
            "lower the learning rate"
        )
    return replace(validated, grad=unit.mul_(norm_limit.limit / unit_norm), clipped_norm=norm)


def _plain(value: object) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)
