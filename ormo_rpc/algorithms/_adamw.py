"""The step of AdamW, shared by the algorithms that take it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.algorithms._momentum import GradientMomentum
from ormo_rpc.algorithms.groups import Group
from ormo_rpc.kernels.steps import AdamWStep
from ormo_rpc.options import option, positive


@dataclass(kw_only=True)
class AdamMoments(GradientMomentum):
    """Running means ``m`` of the gradient and ``v`` of its square, and steps of AdamW by them.

    Step number n (from 1): ``w <- (1 - eta lambda) w; m <- m + (1 - beta1) (g - m); v <- beta2 v + (1 - beta2) g*g;
    w <- w - eta / (1 - beta1^n) m / (sqrt(v / (1 - beta2^n)) + eps)``, with ``beta1`` the momentum. In the operations of
    ``torch.optim.AdamW`` (not ``foreach``, not ``fused``), so that its bits are the same.
    """

    OUT_OF_PLACE = True
    DECAYS_ITSELF = True

    beta2: float = option(
        0.999, "decay of the running mean of the squared gradients", valid=lambda v: 0 <= v < 1, expected="a number in [0, 1)"
    )
    eps: float = option(
        1e-8, "added to the root of that mean, in units of the gradient", valid=positive, expected="a finite number > 0"
    )

    @override
    def init(self, params: torch.Tensor, momentum: float) -> None:
        super().init(params, momentum)
        self.m = torch.zeros_like(params)
        self.v = torch.zeros_like(params)

    def adamw(self, group: Group, lr: float, number: int, divisor: float = 1.0) -> AdamWStep:
        """Return step number n, of a gradient that is divided by ``divisor`` first, in one group of the parameters."""
        rate = lr * group.lr_factor
        return AdamWStep(
            divisor=divisor,
            weight1=1 - self.momentum,
            beta2=self.beta2,
            weight2=1 - self.beta2,
            decay=1 - rate * group.weight_decay,
            size=rate / (1 - self.momentum**number),
            root=(1 - self.beta2**number) ** 0.5,
            eps=self.eps,
        )

    @override
    def state_dict(self) -> Mapping[str, torch.Tensor | int | float]:
        return {"m": self.m, "v": self.v}
