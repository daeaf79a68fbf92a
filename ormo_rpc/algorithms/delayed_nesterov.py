"""Delayed Nesterov momentum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.algorithms._momentum import GradientMomentum
from ormo_rpc.algorithms.base import PushContext
from ormo_rpc.options import at_least_one, option, register


@register("delayed_nesterov")
@dataclass(kw_only=True)
class DelayedNesterov(GradientMomentum):
    """Delayed Nesterov (DN): gradients act at once, the momentum only with every N-th, on the mean of those N.

    Recursion: ``D <- D + g``; with every N-th gradient ``m <- beta m + D / N; w <- w - eta ((1 - c N + c) beta m + g / N);
    D <- 0``, with every other one ``w <- w - eta (c beta m + g / N)``. So ``beta m`` acts once in N gradients, in parts if
    ``c > 0``. A gradient counts 1 / N, so N of them move ``w`` as their mean would. ``eta`` is outside of the momentum, see
    `GradientMomentum`. With N = 1 and ``c = 0`` it is ``torch.optim.SGD(nesterov=True)`` in order of arrival. Memory:
    ``w, m, D``, three vectors of D.

    Source: Liu et al. 2024, arXiv 2401.09135. Departures: one gradient instead of a worker's local steps, and when
        the run ends after n < N gradients of a round, ``m <- beta m + D / N; w <- w - eta (1 - c n) beta m`` closes that round.
    """

    period: int = option(
        4,
        "N, gradients for each change of the momentum",
        valid=at_least_one,
        expected="a whole number >= 1",
    )
    activation: float = option(
        0.0,
        "c, the part of the momentum that acts with each gradient between; sensible up to 1 / N",
        valid=lambda v: 0 <= v < 1,
        expected="a number in [0, 1)",
    )

    @override
    def init(self, params: torch.Tensor, momentum: float) -> None:
        super().init(params, momentum)
        self.m = torch.zeros_like(params)
        self.collected = torch.zeros_like(params)
        self.count = 0

    @override
    def step(self, grad: torch.Tensor, lr: float, context: PushContext) -> None:
        self.add(grad, lr)

    def add(self, grad: torch.Tensor, lr: float) -> None:
        """Apply one gradient, or a displacement in its place."""
        self.collected.add_(grad)
        self.count += 1
        if self.count == self.period:
            self.flush(lr)
        else:
            self._act(lr * self.activation)
        self.params.sub_(grad, alpha=lr / self.period)

    @override
    def flush(self, lr: float) -> None:
        if self.count:
            acted = min(self.count, self.period - 1)  # the N-th gradient brings no part of its own
            self.m.mul_(self.momentum).add_(self.collected, alpha=1 / self.period)
            self.collected.zero_()
            self._act(lr * (1 - self.activation * acted))
            self.count = 0

    def _act(self, factor: float) -> None:
        """Let that much of ``beta m`` act on the parameters."""
        self.params.sub_(self.m, alpha=factor * self.momentum)

    @override
    def state_dict(self) -> Mapping[str, torch.Tensor | int | float]:
        return {"m": self.m, "collected": self.collected, "count": self.count}
