"""Positive-negative momentum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.algorithms._momentum import GradientMomentum
from ormo_rpc.algorithms.base import PushContext
from ormo_rpc.options import option, register


@register("pnm")
@dataclass(kw_only=True)
class PNM(GradientMomentum):
    """Positive-negative momentum: the difference of two momenta, of the even and of the odd gradients.

    Recursion, in order of arrival: ``m_t <- beta^2 m_{t-2} + (1 - beta^2) g;
    w <- w - eta ((1 + beta2) m_t - beta2 m_{t-1}) / sqrt((1 + beta2)^2 + beta2^2)``, with ``beta`` the momentum (beta1 in the
    paper). A momentum is a mean of gradients, so the step does not grow with ``beta`` as that of heavy ball does. ``eta`` is
    outside of the momentum, see `GradientMomentum`. With ``beta = beta2 = 0`` it is `asgd`. Memory: ``w, m_t, m_{t-1}``, three
    vectors of D.

    Source: Xie, Yuan, Zhu, Sugiyama, ICML 2021, arXiv 2103.17182, in the form of the authors' code, which divides by the norm
        of the two coefficients.
    """

    beta2: float = option(
        1.0, "weight of the negative momentum", valid=lambda v: 0 <= v < float("inf"), expected="a finite number >= 0"
    )

    @override
    def init(self, params: torch.Tensor, momentum: float) -> None:
        super().init(params, momentum)
        self.even = torch.zeros_like(params)
        self.odd = torch.zeros_like(params)

    @override
    def step(self, grad: torch.Tensor, lr: float, context: PushContext) -> None:
        positive, negative = (self.odd, self.even) if context.iteration % 2 else (self.even, self.odd)
        square, beta2 = self.momentum**2, self.beta2
        positive.mul_(square).add_(grad, alpha=1 - square)
        scaled_lr = lr / math.hypot(1 + beta2, beta2)
        self.params.sub_(positive, alpha=scaled_lr * (1 + beta2)).add_(negative, alpha=scaled_lr * beta2)

    @override
    def state_dict(self) -> Mapping[str, torch.Tensor | int | float]:
        return {"even": self.even, "odd": self.odd}
