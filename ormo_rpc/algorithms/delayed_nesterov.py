"""Delayed Nesterov momentum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ormo_rpc.algorithms.base import Algorithm, PushContext
from ormo_rpc.options import option


class DelayedNesterov(Algorithm):
    """Delayed Nesterov (DN): gradients act at once, the momentum only with every N-th, on the mean of those N.

    Recursion: ``D <- D + g``; with every N-th gradient ``m <- beta m + D / N; w <- w - eta ((1 - c N + c) beta m + g / N);
    D <- 0``, with every other one ``w <- w - eta (c beta m + g / N)``. So ``beta m`` acts once in N gradients, in parts if
    ``c > 0``. With N = 1 and ``c = 0`` it is ``torch.optim.SGD(nesterov=True)`` in order of context. Memory: ``w, m, D``,
    three vectors of D.

    Source: Liu et al. 2024, arXiv 2401.09135. Departures: one gradient instead of a worker's local steps, and when
        the run ends after n < N gradients of a round, ``m <- beta m + D / N; w <- w - eta (1 - c n) beta m`` closes that round.
    """

    NAME = "delayed_nesterov"

    @dataclass(frozen=True, kw_only=True)
    class Options(Algorithm.Options):
        """How often the momentum moves, and how its effect is spread."""

        name: str = option("delayed_nesterov", "the momentum moves with every N-th gradient only (delayed Nesterov)")
        period: int = option(
            4,
            "N, gradients for each change of the momentum",
            valid=lambda v: v >= 1,
            expected="a whole number >= 1",
        )
        activation: float = option(
            0.0,
            "c, the part of the momentum that acts with each gradient between; sensible up to 1 / N",
            valid=lambda v: 0 <= v < 1,
            expected="a number in [0, 1)",
        )

    def __init__(self, params: Tensor, *, momentum: float, options: Any) -> None:
        super().__init__(params, momentum=momentum, options=options)
        self.m = torch.zeros_like(params)
        self.collected = torch.zeros_like(params)
        self.count = 0

    def step(self, grad: Tensor, lr: float, context: PushContext) -> None:  # noqa: ARG002 - order of context alone matters
        """The gradient at once; with the N-th one the momentum moves, otherwise its part c acts."""
        self.collected.add_(grad)
        self.count += 1
        if self.count == self.options.period:
            self.flush(lr)
        else:
            self._act(lr * self.options.activation)
        self.params.sub_(grad, alpha=lr / self.options.period)

    def flush(self, lr: float) -> None:
        """Close the round: the momentum takes what is collected, and what is left of its effect follows."""
        if self.count:
            acted = min(self.count, self.options.period - 1)  # the N-th gradient brings no part of its own
            self.m.mul_(self.momentum).add_(self.collected, alpha=1 / self.options.period)
            self.collected.zero_()
            self._act(lr * (1 - self.options.activation * acted))
            self.count = 0

    def _act(self, factor: float) -> None:
        """Let that much of ``beta m`` act on the parameters."""
        self.params.sub_(self.m, alpha=factor * self.momentum)

    def state_dict(self) -> Mapping[str, Tensor | int | float]:
        """The momentum ``m``, the sum ``D`` and the number of its gradients."""
        return {"m": self.m, "collected": self.collected, "count": self.count}
