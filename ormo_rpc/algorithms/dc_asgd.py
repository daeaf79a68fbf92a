"""Asynchronous SGD with delay compensation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ormo_rpc.algorithms.base import Algorithm, PushContext
from ormo_rpc.options import option

MEMORY = 0.95
"""What the running mean of the squared gradients keeps of itself at each gradient (the authors' value)."""
EPSILON = 1e-7
"""Added to that mean, in units of the squared gradient (the authors' value)."""


class DCASGD(Algorithm):
    """DC-ASGD: a late gradient is carried over to the present parameters by a diagonal guess of the Hessian, ``lambda g*g``.

    Recursion, elementwise, with ``w_bak`` the copy of the parameters that was sent with the ticket:
    ``w <- w - eta (g + lambda g*g*(w - w_bak))``. The ``adaptive`` form (DC-ASGD-a) first takes
    ``MS <- 0.95 MS + 0.05 g*g`` and then ``lambda_t = lambda / sqrt(MS + 1e-7)`` for each element; the other one (DC-ASGD-c)
    has the same ``lambda`` for all. Memory: ``w`` and, if adaptive, ``MS``: one or two vectors of D; the server keeps the
    copies that were sent, for every algorithm. The momentum is not read. K is not used, so it may change.

    Source: Zheng et al., ICML 2017, arXiv 1609.08326, Algorithm 2; lambda = 2 (adaptive) and 0.04 as in its experiments.
    """

    NAME = "dc_asgd"
    READS_SENT = True

    @dataclass(frozen=True, kw_only=True)
    class Options(Algorithm.Options):
        """The form and strength of the compensation."""

        name: str = option("dc_asgd", "asynchronous SGD with delay compensation (DC-ASGD)")
        adaptive: bool = option(True, "divide the compensation by the running root mean square of the gradient (DC-ASGD-a)")
        compensation: float | None = option(
            None,
            "lambda, the strength, in 1 / loss if not adaptive; default 2 if adaptive, else 0.04",
            valid=lambda v: 0 <= v < float("inf"),
            expected="a finite number >= 0",
        )

    def __init__(self, params: Tensor, *, momentum: float, options: Any) -> None:
        super().__init__(params, momentum=momentum, options=options)
        default = 2.0 if options.adaptive else 0.04
        self.compensation = default if options.compensation is None else options.compensation
        self.mean_square = self.zeros() if options.adaptive else None

    def step(self, grad: Tensor, lr: float, context: PushContext) -> None:
        """``w <- w - eta (g + lambda_t g*g*(w - w_bak))``."""
        assert context.sent is not None, "the server keeps what was sent where READS_SENT"
        correction = self.params - context.sent
        correction.mul_(grad).mul_(grad)
        if self.mean_square is not None:
            self.mean_square.mul_(MEMORY).addcmul_(grad, grad, value=1 - MEMORY)
            correction.div_((self.mean_square + EPSILON).sqrt_())
        self.params.sub_(grad, alpha=lr).sub_(correction, alpha=lr * self.compensation)

    def state_dict(self) -> Mapping[str, Tensor | int | float]:
        """The running mean of the squared gradients ``MS``, if adaptive."""
        return {} if self.mean_square is None else {"mean_square": self.mean_square}
