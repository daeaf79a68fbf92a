"""Asynchronous SGD with momentum in the order of arrival."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.algorithms._momentum import StepMomentum
from ormo_rpc.algorithms.base import PushContext
from ormo_rpc.kernels.steps import HeavyBallStep
from ormo_rpc.options import register


@register("naive")
@dataclass(kw_only=True)
class Naive(StepMomentum):
    """Naive ASGDm: heavy ball that takes a late gradient for a fresh one. It can diverge where the delays are long.

    Recursion: ``u <- beta u + eta g; w <- w - u``, in order of arrival. ``eta`` is inside of the momentum, see `StepMomentum`.
    Memory: ``w, u``, two vectors of D.

    Source: the baseline "naive ASGDm" of arXiv 2407.19234.
    """

    OUT_OF_PLACE = True

    @override
    def init(self, params: torch.Tensor, momentum: float) -> None:
        super().init(params, momentum)
        self.u = torch.zeros_like(params)

    @override
    def advance(self, grad: torch.Tensor, lr: float, scale: float, context: PushContext) -> None:
        self.params = self.kernel.apply(HeavyBallStep(beta=self.momentum * scale, u_scale=lr), grad, self.params, self.u)

    @override
    def state_dict(self) -> Mapping[str, torch.Tensor | int | float]:
        return {"u": self.u, **super().state_dict()}
