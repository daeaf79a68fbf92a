"""Ordered AdamW."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.algorithms._adamw import AdamMoments
from ormo_rpc.algorithms.base import PushContext
from ormo_rpc.kernels.steps import CHUNK
from ormo_rpc.options import not_negative, option, register


@register("ormo_adamw")
@dataclass(kw_only=True)
class OrMoAdamW(AdamMoments):
    """Ordered AdamW (ours): `ormo`'s order of gradients for AdamW, which under ``scheduler=sync`` is synchronous AdamW.

    At every moment ``w`` is what synchronous AdamW would be after a round for each bucket, with the mean of the bucket's
    gradients that have come so far: those that are missing count as zero. A late gradient changes the mean of its own bucket,
    and the steps since are taken again. As they are not linear in the gradient, unlike those of `ormo`, that needs memory: the
    sums ``S_b`` of a window of E + 1 buckets, and ``w, m, v`` as they were before the oldest of them (``w~, m, v``).

    State ``w~, m, v``, the newest bucket ``I``, and for each bucket of the window the sum ``S_b = 0``, its rate ``eta_b`` and
    its size ``K_b``. For a gradient ``g`` taken at an index of bucket ``b``:

    1. *shift*: while ``I`` is smaller than the largest bucket handed out so far, ``I <- I + 1``: bucket ``I - E - 1`` leaves
       the window, by step number ``I - E`` of `AdamMoments` from ``w~, m, v``, with its mean ``S / K`` and its rate; bucket
       ``I`` opens with ``S = 0``, the scheduled rate and the number of gradients in flight of this moment;
    2. ``S_b <- S_b + g``, in the oldest bucket of the window if ``b`` is older;
    3. ``w``: from ``w~, m, v`` the steps of the buckets of the window.

    So the order of arrival within the window does not matter, and with a window as long as the longest delay, in buckets, it
    does not matter at all. With E = 1, the default, hardly any gradient is older: workers that are alike return in the bucket
    of their parameters or the next one. Under ``scheduler=sync`` ``w`` equals synchronous AdamW on the mean of the round's
    gradients at each round's end, to the rounding of their sum; a gradient that a leaving worker takes with it counts as zero
    in its round. One worker is ``torch.optim.AdamW`` to the bit. A worker that joins or leaves changes ``K_b`` of buckets
    opened from then on.

    K gradients make one step, of the size of one: by the same number of samples this moves K times less far than `adamw`, like
    all that average. Weight decay is decoupled, once a bucket. Memory: ``w, w~, m, v`` and the sums, E + 5 vectors of D. Cost:
    E + 1 steps of AdamW for each gradient, and one more for each bucket.

    Source: ours, from `ormo` (arXiv 2407.19234) and AdamW (arXiv 1711.05101). No theorem is known for it. Departure from the
        replay over buckets: what comes too late for the window acts in the oldest bucket that is left.
    """

    window: int = option(
        1,
        "E, buckets before the newest one into which late gradients still go; each costs a vector of D and a step per gradient",
        valid=not_negative,
        expected="a whole number >= 0",
    )

    @override
    def init(self, params: torch.Tensor, momentum: float) -> None:
        super().init(params, momentum)
        self.base = params.clone()
        self.sums = params.new_zeros(self.window + 1, params.numel())
        """``S_b`` in row ``b mod (E + 1)``; rates and sizes alike."""
        self.rates = torch.zeros(self.window + 1, dtype=torch.float64)
        self.sizes = torch.zeros(self.window + 1, dtype=torch.float64)
        self.index = -1

    @override
    def step(self, grad: torch.Tensor, lr: float, context: PushContext) -> None:
        while self.index < context.newest_bucket:
            self._open(self.index + 1, lr, context.concurrency)
        self.sums[self._row(max(context.bucket, self.index - self.window))].add_(grad)
        self.params = self._replayed()

    def _open(self, bucket: int, lr: float, size: int) -> None:
        row, leaving = self._row(bucket), bucket - self.window - 1
        if leaving >= 0:
            rate, divisor = self.rates[row].item(), self.sizes[row].item()
            for group in self.groups:
                base, step = group.of(self.base), self.adamw(group, rate, leaving + 1, divisor)
                self.kernel.steps(step, group.of(self.sums[row]), group.of(self.m), base, base, None, group.of(self.v))
        self.sums[row].zero_()
        self.rates[row], self.sizes[row] = lr, size
        self.index = bucket

    def _replayed(self) -> torch.Tensor:
        """Return the parameters after the steps of the buckets of the window."""
        out, out_16bit = self.kernel.new(self.params)
        rates, sizes = self.rates.tolist(), self.sizes.tolist()
        buckets = range(max(0, self.index - self.window), self.index + 1)
        rows = [self._row(bucket) for bucket in buckets]
        for group in self.groups:
            steps = [self.adamw(group, rates[row], bucket + 1, sizes[row]) for bucket, row in zip(buckets, rows, strict=True)]
            for part in _chunks(group.start, group.stop, CHUNK if out.device.type == "cpu" else group.stop):
                m, v, before = self.m[part].clone(), self.v[part].clone(), self.base[part]
                for step, row, bucket in zip(steps, rows, buckets, strict=True):
                    rounded = out_16bit[part] if out_16bit is not None and bucket == self.index else None
                    self.kernel.steps(step, self.sums[row, part], m, before, out[part], rounded, v)
                    before = out[part]
        return out

    def _row(self, bucket: int) -> int:
        return bucket % (self.window + 1)

    @override
    def state_dict(self) -> Mapping[str, torch.Tensor | int | float]:
        buckets = {"sums": self.sums, "rates": self.rates, "sizes": self.sizes, "index": self.index}
        return {"base": self.base, **buckets, **super().state_dict()}


def _chunks(start: int, stop: int, size: int) -> Iterator[slice]:
    """Divide a range into parts, whose moments stay in a processor's cache from one step to the next."""
    return (slice(begin, min(begin + size, stop)) for begin in range(start, stop, size))
