"""Asynchronous SGD whose workers look ahead along everybody's momentum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.algorithms._momentum import GradientMomentum
from ormo_rpc.algorithms.base import PullContext, PushContext
from ormo_rpc.options import register


@register("dana")
@dataclass(kw_only=True)
class DANA(GradientMomentum):
    """DANA-Zero: one momentum buffer for each worker, and each gradient is taken where the momenta of all will lead.

    Recursion, for a gradient ``g`` of worker ``k``: ``v_k <- beta v_k + g; w <- w - eta v_k``, ``v_k`` in units of the
    gradient. A worker is sent ``w - eta beta total`` with ``total = sum of all v_j``, the parameters after one more step of
    everybody with a gradient of zero, at the learning rate of that step. ``eta`` is outside of the momentum, see
    `GradientMomentum`. With K = 1 this is Nesterov momentum. Memory: ``w, total`` and one ``v_k`` for each
    worker, 2 + K vectors of D. ``v_k`` comes to be, as zero, with the first gradient of a worker and leaves the sum when the
    worker does; K itself is not used, so it may change.

    Source: Hakimi, Barkai, Gabel, Schuster 2019, arXiv 1907.11612, DANA-Zero. With a constant learning rate it equals the
        paper's DANA-Slim, whose momentum lives on the workers. Departures: the look-ahead is at the rate ``eta`` of iteration
        ``t + 1``, the next step's, where the authors take that of ``t``, which differs where the rate changes; and the paper
        has no workers that come and go.
    """

    @override
    def init(self, params: torch.Tensor, momentum: float) -> None:
        super().init(params, momentum)
        self.v: dict[int, torch.Tensor] = {}
        self.total = self.zeros()

    @override
    def step(self, grad: torch.Tensor, lr: float, context: PushContext) -> None:
        if context.worker not in self.v:
            self.v[context.worker] = self.zeros()
        v = self.v[context.worker]
        self.total.sub_(v)
        v.mul_(self.momentum).add_(grad)
        self.total.add_(v)
        self.params.sub_(v, alpha=lr)

    @override
    def leave(self, worker: int) -> None:
        # The sum is made anew, and so loses the rounding that it had gathered.
        if self.v.pop(worker, None) is not None:
            self.total.zero_()
            for v in self.v.values():
                self.total.add_(v)

    @override
    def outgoing(self, context: PullContext) -> torch.Tensor:
        return self.params.sub(self.total, alpha=context.lr * self.momentum)

    @override
    def state_dict(self) -> Mapping[str, torch.Tensor | int | float]:
        return {"total": self.total, **self.by_worker("v", self.v)}
