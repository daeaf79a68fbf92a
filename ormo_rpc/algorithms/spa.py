"""Stochastic primal averaging."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.algorithms._momentum import StepMomentum
from ormo_rpc.algorithms.base import PushContext
from ormo_rpc.options import option, register


@register("spa")
@dataclass(kw_only=True)
class SPA(StepMomentum):
    """Stochastic primal averaging: SGD with a large step on ``z``, and ``w`` its running average, where gradients are taken.

    Recursion, in order of arrival: ``z <- z - gamma g; w <- (1 - c) w + c z`` with ``gamma = eta / (1 - beta)``. With
    ``c = 1 - beta``, the default, this is heavy ball (`naive`) for every schedule of ``eta``, and ``z`` is the
    ``y = w - beta / (1 - beta) u`` of `ormo`; with ``beta = 0`` it is `asgd` bit for bit. A late gradient moves ``z`` as it
    would have moved it in time. ``eta`` is inside of the momentum, which is ``c / (1 - c) (w - z)``: where it is corrected
    (see `StepMomentum`), ``z <- w + (z - w) eta_new / eta_old`` comes first. Memory: ``w, z``, two vectors of D.

    Source: Defazio 2020, arXiv 2010.00406. Departure: ``eta`` and ``beta`` are given in place of ``gamma``.
    """

    averaging: float | None = option(
        None,
        "c, the weight of z in the average w; default 1 - momentum, which is heavy ball",
        valid=lambda v: 0 < v <= 1,
        expected="a number in (0, 1]",
    )

    @override
    def init(self, params: torch.Tensor, momentum: float) -> None:
        super().init(params, momentum)
        self.z = params.clone()

    @override
    def advance(self, grad: torch.Tensor, lr: float, scale: float, context: PushContext) -> None:
        c = self.averaging
        if scale != 1.0:
            self.z.sub_(self.params).mul_(scale).add_(self.params)
        self.z.sub_(grad, alpha=lr / (1 - self.momentum))
        self.params.lerp_(self.z, 1 - self.momentum if c is None else c)

    @override
    def return_to(self, params: torch.Tensor) -> None:
        self.z.add_(params - self.params)
        super().return_to(params)

    @override
    def state_dict(self) -> Mapping[str, torch.Tensor | int | float]:
        return {"z": self.z, **super().state_dict()}
