"""Asynchronous SGD."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ormo_rpc.algorithms.base import Algorithm, PushContext
from ormo_rpc.kernels.steps import SGDStep
from ormo_rpc.options import option


class ASGD(Algorithm):
    """Asynchronous SGD without momentum: every gradient moves the parameters as it comes.

    Recursion: ``w <- w - eta g``. Memory: ``w``, one vector of D. The momentum is not read.
    Source: Agarwal and Duchi 2011 (arXiv 1104.5525); the baseline ASGD of arXiv 2407.19234.
    """

    NAME = "asgd"
    OUT_OF_PLACE = True

    @dataclass(frozen=True, kw_only=True)
    class Options(Algorithm.Options):
        """No options of its own."""

        name: str = option("asgd", "asynchronous SGD, no momentum")

    def step(self, grad: Tensor, lr: float, context: PushContext) -> None:  # noqa: ARG002 - its age does not matter here
        """``w <- w - eta g``."""
        self.params = self.kernel.step(SGDStep(w_scale=lr), grad, self.params)
