"""AdamW in order of arrival."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.algorithms._adamw import AdamMoments
from ormo_rpc.algorithms.base import PushContext
from ormo_rpc.options import register


@register("adamw")
@dataclass(kw_only=True)
class AdamW(AdamMoments):
    """AdamW that takes a late gradient for a fresh one: each gradient is a step, in order of arrival.

    Recursion: that of `AdamMoments`, with n the gradients applied so far, this one included. The weight decay is decoupled: the
    server multiplies ``w`` once for each gradient, whatever its delay. ``eta`` is outside of the momentum, see
    `GradientMomentum`; it may differ between parameters (``train.lr_factors``). With one worker it is ``torch.optim.AdamW`` to
    the bit, under any schedule of rates and with parameter groups. K is not used, so it may change. Memory: ``w, m, v``, three
    vectors of D.

    Source: Loshchilov and Hutter, ICLR 2019, arXiv 1711.05101, Algorithm 2, in torch's form, where ``eta`` multiplies the decay
        too; Kingma and Ba, ICLR 2015, arXiv 1412.6980. Departure: gradients come from several workers, with delays.
    """

    @override
    def step(self, grad: torch.Tensor, lr: float, context: PushContext) -> None:
        out, out_16bit = self.kernel.new(self.params)
        for group in self.groups:
            self.kernel.steps(
                self.adamw(group, lr, context.iteration + 1),
                group.of(grad),
                group.of(self.m),
                group.of(self.params),
                group.of(out),
                group.of(out_16bit),
                group.of(self.v),
            )
        self.params = out
