"""Asynchronous SGD with shifted momentum: one momentum buffer for each worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.algorithms._momentum import StepMomentum
from ormo_rpc.algorithms.base import PushContext
from ormo_rpc.kernels.steps import HeavyBallStep
from ormo_rpc.options import register


@register("shifted")
@dataclass(kw_only=True)
class Shifted(StepMomentum):
    """Shifted momentum: a gradient meets the momentum of the time at which it was taken, not that of its arrival.

    Recursion, for a gradient ``g`` of worker ``k``: ``v_k <- beta v_k + eta g; w <- w - v_k``, ``v_k`` in units of the
    parameters. Under the asynchronous scheduler a worker's last gradient was applied just before its stamp, so this is
    ``v_t = beta v_(t - tau) + eta g`` with one ``v`` for each iteration. ``eta`` is inside of the momentum, see `StepMomentum`;
    a corrected ``v_k`` is rescaled when a gradient of worker ``k`` comes. Memory: ``w`` and one ``v_k`` for each worker, 1 + K
    vectors of D. ``v_k`` comes to be, as zero, with the first gradient of a worker and goes when the worker leaves; K itself is
    not used, so it may change.

    Source: Giladi, Nacson, Hoffer, Soudry, ICLR 2020, arXiv 1909.12340 (shifted momentum). Departure: the paper has neither
        barriers, under which the form with one buffer for each worker is kept, nor workers that come and go.
    """

    OUT_OF_PLACE = True

    @override
    def init(self, params: torch.Tensor, momentum: float) -> None:
        super().init(params, momentum)
        self.v: dict[int, torch.Tensor] = {}
        self.lr_of_v: dict[int, float] = {}

    @override
    def advance(self, grad: torch.Tensor, lr: float, scale: float, context: PushContext) -> None:
        if context.worker not in self.v:
            self.v[context.worker] = self.zeros()
        self.params = self.kernel.apply(
            HeavyBallStep(beta=self.momentum * scale, u_scale=lr), grad, self.params, self.v[context.worker]
        )

    @override
    def rate_of_momentum(self, worker: int) -> float:
        return self.lr_of_v.get(worker, 1.0)

    @override
    def set_rate_of_momentum(self, worker: int, lr: float) -> None:
        self.lr_of_v[worker] = lr

    @override
    def leave(self, worker: int) -> None:
        self.v.pop(worker, None)
        self.lr_of_v.pop(worker, None)

    @override
    def state_dict(self) -> Mapping[str, torch.Tensor | int | float]:
        return {**self.by_worker("v", self.v), **self.by_worker("lr_of_v", self.lr_of_v)}
