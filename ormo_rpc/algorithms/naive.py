"""Asynchronous SGD with momentum in the order of context."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ormo_rpc.algorithms.base import Algorithm, PushContext
from ormo_rpc.kernels.steps import HeavyBallStep
from ormo_rpc.options import option


class Naive(Algorithm):
    """Naive ASGDm: heavy ball that takes a late gradient for a fresh one. It can diverge where the delays are long.

    Recursion: ``u <- beta u + eta g; w <- w - u``, in order of context. Memory: ``w, u``, two vectors of D.
    Source: the baseline "naive ASGDm" of arXiv 2407.19234.
    """

    NAME = "naive"
    OUT_OF_PLACE = True

    @dataclass(frozen=True, kw_only=True)
    class Options(Algorithm.Options):
        """No options of its own."""

        name: str = option("naive", "heavy ball in order of context (naive ASGDm)")

    def __init__(self, params: Tensor, *, momentum: float, options: Any) -> None:
        super().__init__(params, momentum=momentum, options=options)
        self.u = torch.zeros_like(params)

    def step(self, grad: Tensor, lr: float, context: PushContext) -> None:  # noqa: ARG002 - that it does not look is its fault
        """``u <- beta u + eta g; w <- w - u``."""
        self.params = self.kernel.step(HeavyBallStep(beta=self.momentum, u_scale=lr), grad, self.params, self.u)

    def state_dict(self) -> Mapping[str, Tensor | int | float]:
        """The momentum ``u``."""
        return {"u": self.u}
