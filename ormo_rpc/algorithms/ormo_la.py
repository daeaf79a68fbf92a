"""Ordered momentum whose workers look ahead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.algorithms.base import PullContext, PushContext
from ormo_rpc.algorithms.ormo import OrMo
from ormo_rpc.options import register


@register("ormo_la")
@dataclass(kw_only=True)
class OrMoLA(OrMo):
    """OrMo, and each gradient is taken where the momentum will have led by the time at which it comes back.

    Recursion: as `OrMo`. A worker is not sent ``w`` but ``w`` after ``n + 1`` momentum shifts without a gradient,

        ``w - (beta + beta^2 + ... + beta^(n+1)) u = w - beta (1 - beta^(n+1)) / (1 - beta) u``,

    where ``n``, in general no whole number, is the mean of the exponents ``e`` with which its own gradients have been applied:
    how many buckets late they come. A worker without a past has ``n = 0``. The shift more is Nesterov's: n = 0 is Nesterov
    momentum, so under the synchronous scheduler this is Nesterov momentum on the sum of the K gradients, and with K = 1
    ``torch.optim.SGD(nesterov=True)``, whose parameters are what is sent. However late a worker is, it is sent a point between
    ``w`` and ``w - beta / (1 - beta) u``, at which ``w`` would come to rest. With ``beta = 0`` it is `asgd` bit for bit.
    There is nothing to tune.

    With ``momentum_correction`` the look-ahead is at the rate of the next step. Memory: ``w, u``, two vectors of D, and two
    numbers for each worker; what is sent is made for each reply, and is its worker's own.

    Source: ours. The derivation, and what else was tried, are in docs/look_ahead.md.
    """

    @override
    def init(self, params: torch.Tensor, momentum: float) -> None:
        super().init(params, momentum)
        self.late: dict[int, int] = {}
        self.applied: dict[int, int] = {}

    @override
    def advance(self, grad: torch.Tensor, lr: float, scale: float, context: PushContext) -> None:
        super().advance(grad, lr, scale, context)
        worker = context.worker
        self.late[worker] = self.late.get(worker, 0) + self.index - context.bucket
        self.applied[worker] = self.applied.get(worker, 0) + 1

    @override
    def leave(self, worker: int) -> None:
        self.late.pop(worker, None)
        self.applied.pop(worker, None)

    @override
    def outgoing(self, context: PullContext) -> torch.Tensor:
        if self.momentum == 0:
            return self.params
        buckets = self.late[context.worker] / self.applied[context.worker] if context.worker in self.applied else 0.0
        ahead = self.momentum * self._reach(buckets)
        if self.momentum_correction:
            ahead *= context.lr / self.momentum_lr
        return self.params.sub(self.u, alpha=ahead)

    @override
    def state_dict(self) -> Mapping[str, torch.Tensor | int | float]:
        return {
            **super().state_dict(),
            **self.by_worker("late", self.late),
            **self.by_worker("applied", self.applied),
        }
