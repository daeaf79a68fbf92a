"""Ringmaster ASGD."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.algorithms.base import Algorithm, PushContext
from ormo_rpc.options import option, register


@register("ringmaster")
@dataclass(kw_only=True)
class Ringmaster(Algorithm):
    """Ringmaster ASGD: a gradient whose delay reaches R is discarded and its worker answered with fresh parameters.

    Recursion: ``w <- w - eta g`` if ``tau < R``, otherwise nothing. A discarded gradient does not advance ``t``, so the delay
    counts applied gradients, and its ticket is issued again. Memory: ``w``, one vector of D. The momentum is not read.

    Source: Maranjyan, Tyurin, Richtarik, ICML 2025, arXiv 2501.16168, without calculation stops. Departure: R is ``2 K`` where
        it is not given; the paper's ``max(1, ceil(sigma^2 / epsilon))`` needs the noise of the gradients.
    """

    NEEDS_IMMEDIATE_REPLIES = "it bounds the delays by what it discards, not by letting workers wait; use async"

    delay_threshold: int | None = option(
        None,
        "R, the smallest delay that is discarded, in iterations; default 2 K, K being the gradients in flight",
        valid=lambda v: isinstance(v, int) and v >= 1,
        expected="a whole number >= 1",
    )

    @override
    def accepts(self, context: PushContext) -> bool:
        threshold = self.delay_threshold
        return context.delay < (2 * context.concurrency if threshold is None else threshold)

    @override
    def step(self, grad: torch.Tensor, lr: float, context: PushContext) -> None:
        self.params.sub_(grad, alpha=lr)
