"""Asynchronous SGD with a single momentum buffer that is updated once a round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.algorithms._momentum import GradientMomentum
from ormo_rpc.algorithms.base import PullContext, PushContext
from ormo_rpc.options import register


@register("smega2")
@dataclass(kw_only=True)
class SMEGA2(GradientMomentum):
    """SMEGA2: one momentum of mean gradients for all workers, and each gradient is taken where ``w`` will be K steps on.

    State ``w``, momentum ``v`` and sum of the round's gradients ``G`` (both in units of the gradient), ``c`` gradients in the
    round. For a gradient ``g``: ``c <- c + 1; G <- G + g; w <- w - eta (g + beta v)``; then, where ``c >= K``, a new round:
    ``v <- beta v + G / c; G <- 0; c <- 0``. A worker is sent ``w - eta beta ((K + c (beta - 1)) v + (c / K) G)``, the
    parameters after K more gradients of zero at the learning rate of the next step. ``eta`` is outside of the momentum, see
    `GradientMomentum`. With K = 1 this is Nesterov momentum. Memory: ``w, v, G``, three vectors of D.

    K may change: a round takes K gradients, K as it is when they come, and ``G / c`` is always their mean. Where K fell to
    ``c`` or less, the next gradient ends the round, and the estimate is that of K gradients of zero again. At the end of a run
    the round is closed with what it has, which changes ``v`` alone: ``w`` has had its gradients already.

    Source: Cohen, Hakimi, Schuster, ICPP 2022 (SMEGA2). Departures: the look-ahead is at the rate ``eta`` of iteration
        ``t + 1``, the next step's, where the authors take that of ``t``, which differs where the rate changes; and K is
        constant in the paper, so its mean is ``G / K``.
    """

    @override
    def init(self, params: torch.Tensor, momentum: float) -> None:
        super().init(params, momentum)
        self.v = self.zeros()
        self.G = self.zeros()
        self.count = 0

    @override
    def step(self, grad: torch.Tensor, lr: float, context: PushContext) -> None:
        self.params.sub_(grad, alpha=lr).sub_(self.v, alpha=lr * self.momentum)
        self.G.add_(grad)
        self.count += 1
        if self.count >= context.concurrency:
            self._close()

    @override
    def flush(self, lr: float) -> None:
        if self.count:
            self._close()

    @override
    def outgoing(self, context: PullContext) -> torch.Tensor:
        late = min(self.count, context.concurrency - 1)
        size = max(self.count + 1, context.concurrency)
        ahead = self.v * (context.concurrency + late * (self.momentum - 1))
        ahead.add_(self.G, alpha=late / size)
        return self.params.sub(ahead, alpha=context.lr * self.momentum)

    def _close(self) -> None:
        self.v.mul_(self.momentum).add_(self.G, alpha=1 / self.count)
        self.G.zero_()
        self.count = 0

    @override
    def state_dict(self) -> Mapping[str, torch.Tensor | int | float]:
        return {"v": self.v, "G": self.G, "count": self.count}
