"""Asynchronous SGD with delay compensation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.algorithms.base import Algorithm, PushContext
from ormo_rpc.options import option, register

MEMORY = 0.95
"""Decay of the running mean of the squared gradients (the authors' value)."""
EPSILON = 1e-7
"""Added to that mean, in units of the squared gradient (the authors' value)."""


@register("dc_asgd")
@dataclass(kw_only=True)
class DCASGD(Algorithm):
    """DC-ASGD: a late gradient is carried over to the present parameters by a diagonal guess of the Hessian, ``lambda g*g``.

    Recursion, elementwise, with ``w_bak`` the copy of the parameters that was sent with the ticket:
    ``w <- w - eta (g + lambda g*g*(w - w_bak))``. The ``adaptive`` form (DC-ASGD-a) first takes
    ``MS <- 0.95 MS + 0.05 g*g`` and then ``lambda_t = lambda / sqrt(MS + 1e-7)`` for each element; the other one (DC-ASGD-c)
    has the same ``lambda`` for all. Memory: ``w`` and, if adaptive, ``MS``: one or two vectors of D; the server keeps the
    copies that were sent, for every algorithm. The momentum is not read. K is not used, so it may change.

    Source: Zheng et al., ICML 2017, arXiv 1609.08326, Algorithm 2; lambda = 2 (adaptive) and 0.04 as in its experiments.
        Departure: there is one ``MS`` for all gradients in order of arrival, where the authors keep one for each worker.
    """

    READS_SENT = True
    REFUSES_LR_FACTORS = "its compensation has the square of the gradient, so a scaled gradient is no scaled step"

    adaptive: bool = option(True, "divide the compensation by the running root mean square of the gradient (DC-ASGD-a)")
    compensation: float | None = option(
        None,
        "lambda, the strength, in 1 / loss if not adaptive; default 2 if adaptive, else 0.04",
        valid=lambda v: 0 <= v < float("inf"),
        expected="a finite number >= 0",
    )

    @override
    def init(self, params: torch.Tensor, momentum: float) -> None:
        super().init(params, momentum)
        default = 2.0 if self.adaptive else 0.04
        self.strength = default if self.compensation is None else self.compensation
        self.mean_square = self.zeros() if self.adaptive else None

    @override
    def step(self, grad: torch.Tensor, lr: float, context: PushContext) -> None:
        assert context.sent is not None, "the server keeps what was sent where READS_SENT"
        correction = self.params - context.sent
        correction.mul_(grad).mul_(grad)
        if self.mean_square is not None:
            self.mean_square.mul_(MEMORY).addcmul_(grad, grad, value=1 - MEMORY)
            correction.div_((self.mean_square + EPSILON).sqrt_())
        self.params.sub_(grad, alpha=lr).sub_(correction, alpha=lr * self.strength)

    @override
    def state_dict(self) -> Mapping[str, torch.Tensor | int | float]:
        return {} if self.mean_square is None else {"mean_square": self.mean_square}
