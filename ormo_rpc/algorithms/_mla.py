"""The recursion that `mla` and `heloco` share: moves of local steps, and a momentum along which workers look ahead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.algorithms._local_steps import LocalSteps, sgd_steps
from ormo_rpc.algorithms._momentum import StepMomentum
from ormo_rpc.algorithms.base import LocalWork, PullContext, PushContext
from ormo_rpc.options import option, positive


@dataclass(kw_only=True)
class MomentumLookAhead(LocalSteps, StepMomentum):
    """``m <- mu m + (1 - mu) G; w <- w - gamma (G + mu m)`` for a push ``G``; workers are sent ``w - gamma mu m``.

    ``mu`` is ``train.momentum`` and ``gamma`` ``outer_lr``. ``G``, start minus end of H local steps, and so ``m`` have the
    learning rate of the steps in them. Where the momentum is corrected (see `StepMomentum`), ``G`` is brought from the rate of
    its ticket's issue to the present one, and ``m`` goes with the rate.
    """

    local_momentum: float = option(
        0.0,
        "momentum of the local steps, from 0 at each ticket (train.momentum is mu, the server's)",
        valid=lambda v: 0 <= v < 1,
        expected="a number in [0, 1)",
    )
    outer_lr: float = option(
        0.7, "gamma, by which the server multiplies what the local steps bring", valid=positive, expected="a finite number > 0"
    )
    look_ahead: bool = option(True, "workers are sent w - gamma mu m; false: w")

    @override
    def init(self, params: torch.Tensor, momentum: float) -> None:
        super().init(params, momentum)
        self.m = torch.zeros_like(params)

    @override
    def advance(self, grad: torch.Tensor, lr: float, scale: float, context: PushContext) -> None:
        if scale != 1.0:
            self.m.mul_(scale)
        moved = grad * (lr / (context.sent_lr or 1.0)) if self.momentum_correction else grad
        moved = self.corrected(moved)
        self.m.mul_(self.momentum).add_(moved, alpha=1 - self.momentum)
        self.params.sub_(moved, alpha=self.outer_lr).sub_(self.m, alpha=self.outer_lr * self.momentum)

    def corrected(self, moved: torch.Tensor) -> torch.Tensor:
        """Return what enters the recursion for a push, shape (D,), in units of the parameters; ``moved`` is not modified."""
        return moved

    @override
    def outgoing(self, context: PullContext) -> torch.Tensor:
        if not self.look_ahead or not self.momentum:
            return self.params
        ratio = context.lr / self.momentum_lr if self.momentum_correction else 1.0
        return self.params.sub(self.m, alpha=self.outer_lr * self.momentum * ratio)

    @override
    def local(self, work: LocalWork, push: torch.Tensor) -> None:
        # While the rate is 0, a corrected momentum takes the gradients at the rate 1.
        rate = (work.lr or 1.0) if self.momentum_correction else work.lr
        sgd_steps(work, push, momentum=self.local_momentum, rate=rate)

    @override
    def state_dict(self) -> Mapping[str, torch.Tensor | int | float]:
        return {"m": self.m, **super().state_dict()}
