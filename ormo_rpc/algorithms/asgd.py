"""Asynchronous SGD."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.algorithms.base import Algorithm, PushContext
from ormo_rpc.kernels.steps import SGDStep
from ormo_rpc.options import register


@register("asgd")
@dataclass(kw_only=True)
class ASGD(Algorithm):
    """Asynchronous SGD without momentum: every gradient moves the parameters as it comes.

    Recursion: ``w <- w - eta g``. Memory: ``w``, one vector of D. The momentum is not read.
    Source: Agarwal and Duchi 2011 (arXiv 1104.5525); the baseline ASGD of arXiv 2407.19234.
    """

    OUT_OF_PLACE = True

    @override
    def step(self, grad: torch.Tensor, lr: float, context: PushContext) -> None:
        self.params = self.kernel.apply(SGDStep(w_scale=lr), grad, self.params)
