"""Asynchronous SGD with momentum that shrinks a gradient by how far the parameters have moved since."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.algorithms._momentum import GradientMomentum
from ormo_rpc.algorithms.base import PushContext
from ormo_rpc.options import register

MEMORY = 0.999
"""Decay of the running mean of the squared momentum (the authors' value)."""
EPSILON = 1e-8
"""Added to the root mean square of the momentum, in units of the gradient (the authors' value)."""


@register("gap_aware")
@dataclass(kw_only=True)
class GapAware(GradientMomentum):
    """Gap-aware: each element of a gradient is divided by the number of usual steps that the parameters went meanwhile.

    Recursion, elementwise, with ``w_bak`` the copy of the parameters that was sent with the ticket and ``n`` the gradients so
    far: ``C = max_lr (sqrt(MS / (1 - 0.999^n)) + 1e-8)``, ``g <- g / (1 + |w - w_bak| / C)``, then
    ``v <- beta v + g; w <- w - eta v``, then ``MS <- 0.999 MS + 0.001 v*v``. ``v`` is in units of the gradient: ``eta`` is
    outside of the momentum, see `GradientMomentum`; ``max_lr`` is the largest learning rate so far. There is no gap before the
    first gradient (``n = 0``) nor while ``max_lr`` is 0. Factors of ``train.lr_factors``, which multiply ``g``, are factors of
    ``eta`` but for the 1e-8, as ``v`` and ``C`` scale with ``g``. Memory: ``w, v, MS``, three vectors of D; the copies that
    were sent are kept by the server for every algorithm. K is not used, so it may change.

    Source: Barkai, Hakimi, Schuster, ICLR 2020, arXiv 1909.10802, with the constants of the public code. Departures: one
        momentum for all in order of arrival, as in `naive`, which it equals where every gap is zero and the learning rate
        constant; ``MS`` averages ``v_1, ..., v_n``, where the public code counts ``v_0 = 0`` too; with ``beta = 0`` it averages
        the divided gradients before the present one, where the public code averages undivided ones with the present one.
    """

    READS_SENT = True

    @override
    def init(self, params: torch.Tensor, momentum: float) -> None:
        super().init(params, momentum)
        self.v = self.zeros()
        self.mean_square = self.zeros()
        self.count = 0
        self.max_lr = 0.0

    @override
    def step(self, grad: torch.Tensor, lr: float, context: PushContext) -> None:
        assert context.sent is not None, "the server keeps what was sent where READS_SENT"
        self.max_lr = max(self.max_lr, lr)
        self.v.mul_(self.momentum)
        if self.count and self.max_lr > 0:
            usual = (self.mean_square / (1 - MEMORY**self.count)).sqrt_().add_(EPSILON).mul_(self.max_lr)
            gap = (self.params - context.sent).abs_()
            self.v.addcdiv_(grad, gap.div_(usual).add_(1))
        else:
            self.v.add_(grad)
        self.params.sub_(self.v, alpha=lr)
        self.mean_square.mul_(MEMORY).addcmul_(self.v, self.v, value=1 - MEMORY)
        self.count += 1

    @override
    def state_dict(self) -> Mapping[str, torch.Tensor | int | float]:
        return {"v": self.v, "mean_square": self.mean_square, "count": self.count, "max_lr": self.max_lr}
