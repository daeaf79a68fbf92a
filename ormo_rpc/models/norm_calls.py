"""The calls of a batch norm: the statistics of each one's batch, and their mean over the calls for a ticket."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ormo_rpc.errors import ModelRefused
from ormo_rpc.models.buffers import buffers_of
from ormo_rpc.server.buffer_layout import as_bytes, same_bytes

if TYPE_CHECKING:
    from torch.nn.modules.batchnorm import (
        _BatchNorm as BatchNorm,  # pyright: ignore[reportPrivateUsage] # the base class of all batch norms
    )


class NormCalls:
    """The calls of one batch norm for a ticket, each with the statistics of its batch.

    During a call that trains, the norm has zeros as running statistics and the momentum 1, so that the call leaves the
    statistics of its batch there. Then its own ones come back, and are advanced as torch would have done.

    To compare values on a GPU is to wait for it. So there they are compared for some tickets alone, and torch's counts of
    changes otherwise, which miss what writes past torch.

    Args:
        prefix: The norm's name, with a dot at the end.
        norm: The norm; it gets hooks.
        expected: What its buffers are expected to be, by name: loaded with them, and advanced here.

    Attributes:
        batches: Mean and variance of each call, in order.
        expected: Its running mean and variance, as they should be.
        calls_before: The calls that it had counted before.
    """

    def __init__(self, prefix: str, norm: BatchNorm, expected: Mapping[str, torch.Tensor]) -> None:
        self.prefix = prefix
        self.norm = norm
        self.momentum = norm.momentum
        self.batches: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._own: tuple[torch.Tensor, torch.Tensor] | None = None
        self._compares_values = True
        self._versions: list[int] = []
        """Torch's counts of changes of the norm's buffers when they were loaded."""
        self._numbers: dict[int, torch.Tensor] = {}
        """Numbers of calls, as they are reported."""
        self.expected = [expected[f"{prefix}{name}"] for name in ("running_mean", "running_var")]
        self.calls_before = expected[f"{prefix}num_batches_tracked"]

        # A copy of the norm has these hooks too, and is none of ours.
        def before(called: torch.nn.Module, _: object) -> None:
            if called is norm:
                self._before()

        def after(called: torch.nn.Module, _: object, output: object) -> None:
            if called is norm:
                self._after(failed=output is None)

        self._hooks = [
            norm.register_forward_pre_hook(before),
            norm.register_forward_hook(
                after, prepend=True, always_call=True
            ),  # so that hooks of the user's see its own statistics
        ]

    def close(self) -> None:
        """Take the hooks from the norm."""
        for hook in self._hooks:
            hook.remove()

    def begin(self, *, compares_values: bool) -> None:
        """Forget all calls, since the norm's buffers were loaded; in the end compare their values, or their changes alone."""
        self.batches = []
        self._compares_values = compares_values
        self._versions = [] if compares_values else self._changes()

    def report(self, *, checked: bool = False) -> dict[str, torch.Tensor]:
        """Return the number of calls and the mean of their statistics by name; nothing where there was no call.

        Args:
            checked: The statistics are the expected ones (`are_expected`).

        Raises:
            ModelRefused: the statistics were changed otherwise.
        """
        if not checked:
            self._check()
        count = len(self.batches)
        if count == 0:
            return {}
        assert self.norm.num_batches_tracked is not None, "it was there a moment ago"
        if count not in self._numbers:
            self._numbers[count] = torch.full_like(self.norm.num_batches_tracked, count)
        reported = {f"{self.prefix}num_batches_tracked": self._numbers[count]}
        if self.momentum != 0:  # no call counts
            means, variances = zip(*self.batches, strict=True)
            reported[f"{self.prefix}running_mean"] = self._mean(means)
            reported[f"{self.prefix}running_var"] = self._mean(variances)
        return reported

    def _mean(self, values: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The mean, in which a call weighs what it has in the norm's own average after the last one."""
        if len(values) == 1:
            return values[0]
        stay = 1.0 if self.momentum is None else 1.0 - self.momentum
        weights = [stay**age for age in reversed(range(len(values)))]
        total = sum(weights)
        return torch.stack([value * (weight / total) for value, weight in zip(values, weights, strict=True)]).sum(0)

    def _before(self) -> None:
        norm = self.norm
        if not (norm.training and norm.track_running_stats):
            return
        if norm.momentum != self.momentum:
            raise ModelRefused(
                f"model: {self.prefix}momentum: got {norm.momentum} in a forward pass, expected {self.momentum}, as at "
                "construction; the server averages with that one, so leave it as it is"
            )
        mean, variance, _ = self.statistics()
        if mean is None or variance is None:
            raise ModelRefused(self._refusal())
        self._own = mean, variance
        self._put(torch.zeros_like(mean), torch.zeros_like(variance))
        norm.momentum = 1.0

    def _after(self, *, failed: bool) -> None:
        norm, own = self.norm, self._own
        if own is None:
            return
        mean, variance, count = self.statistics()
        assert mean is not None, "it was put there"
        assert variance is not None, "as this one"
        self._put(*own)
        norm.momentum = self.momentum
        self._own = None
        if failed and not (mean.any() or variance.any()):
            return  # it did not get that far, unlike one that checkpointing has stopped once it had run
        self.batches.append((mean, variance))
        weight = 1 / int(count) if self.momentum is None and count is not None else self.momentum
        assert weight is not None, "a norm that is averaged counts its calls"
        for average in (own, self.expected) if self._compares_values else (own,):
            for running, batch in zip(average, (mean, variance), strict=True):
                running.data.mul_(1 - weight).add_(batch, alpha=weight)

    def statistics(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Running mean, running variance and number of calls, as the norm has them now."""
        held = buffers_of(self.norm)
        return held.get("running_mean"), held.get("running_var"), held.get("num_batches_tracked")

    def _changes(self) -> list[int]:
        return [-1 if tensor is None else tensor._version for tensor in self.statistics()]

    def _put(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        held = buffers_of(self.norm)
        held["running_mean"], held["running_var"] = mean, variance

    def _check(self) -> None:
        mean, variance, count = self.statistics()
        if mean is None or variance is None or count is None:
            raise ModelRefused(self._refusal())
        if not self._compares_values:
            *own, calls = self._versions
            if self._changes() != [*own, calls + len(self.batches)]:
                raise ModelRefused(self._refusal())
            return
        same = all(map(_same, (mean, variance), self.expected))
        if int(count) != int(self.calls_before) + len(self.batches) or not same:
            raise ModelRefused(self._refusal())

    def _refusal(self) -> str:
        return (
            f"model: {self.prefix.rstrip('.') or 'the batch norm'}: its statistics were changed outside of its calls, expected "
            "that only calls of the module do so; call the module itself, neither its forward nor functional.batch_norm"
        )


def are_expected(norms: Sequence[NormCalls]) -> bool:
    """Tell at once that the statistics of all norms are the expected ones, where a GPU would be waited for at each.

    False says nothing: then each is looked at.
    """
    found = [norm.statistics() for norm in norms]
    held = [tensor for mean, variance, _ in found for tensor in (mean, variance) if tensor is not None]
    expected = [tensor for norm in norms for tensor in norm.expected]
    counts = [count for _, _, count in found if count is not None]
    forms = [(tensor.dtype, tensor.shape) for tensor in held] == [(tensor.dtype, tensor.shape) for tensor in expected]
    if not norms or not forms or len(counts) != len(norms):
        return False
    calls = torch.tensor([len(norm.batches) for norm in norms]).to(counts[0].device, non_blocking=True)
    counted = torch.stack([norm.calls_before for norm in norms]) + calls
    return torch.equal(
        torch.cat([as_bytes(torch.stack(counts)), *map(as_bytes, held)]),
        torch.cat([as_bytes(counted), *map(as_bytes, expected)]),
    )


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell if they have equal values; by the bytes where these may be NaN, which takes longer."""
    return (one.dtype == other.dtype and torch.equal(one, other)) or same_bytes(one, other)
