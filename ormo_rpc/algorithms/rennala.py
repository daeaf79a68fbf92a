"""Rennala SGD."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.algorithms.base import Algorithm, PushContext
from ormo_rpc.options import at_least_one, option, register


@register("rennala")
@dataclass(kw_only=True)
class Rennala(Algorithm):
    """Rennala SGD: a step is the mean of B gradients that were all taken at the present parameters; others are discarded.

    Recursion: a gradient ``g`` is accepted if it was taken at the present *version* of ``w``, the number of times that ``w``
    has changed: ``G <- G + g``. With the B-th one ``w <- w - eta G / B; G <- 0; version <- version + 1``. A discarded gradient
    does not advance ``t``, its ticket is issued again. Memory: ``w, G``, two vectors of D. The momentum is not read.

    Source: Tyurin, Richtarik, NeurIPS 2023, arXiv 2305.12387 (Rennala SGD). Departure: when the run ends, a rest of fewer than
        B gradients is applied with the weight ``eta / B`` that each would have had.
    """

    FRESH = True
    NEEDS_IMMEDIATE_REPLIES = (
        "it decides itself whose gradients make up a step, and a worker that is held back adds none to it; use async"
    )

    batch: int = option(4, "B, gradients that make a step", valid=at_least_one, expected="a whole number >= 1")

    @override
    def init(self, params: torch.Tensor, momentum: float) -> None:
        super().init(params, momentum)
        self.collected = torch.zeros_like(params)
        self.count = 0

    @override
    def accepts(self, context: PushContext) -> bool:
        return context.version == self.version

    @override
    def step(self, grad: torch.Tensor, lr: float, context: PushContext) -> None:
        self.collected.add_(grad)
        self.count += 1
        if self.count == self.batch:
            self.flush(lr)

    @override
    def flush(self, lr: float) -> None:
        if self.count:
            self.params.sub_(self.collected, alpha=lr / self.batch)
            self.collected.zero_()
            self.count = 0
            self.version += 1

    @override
    def state_dict(self) -> Mapping[str, torch.Tensor | int | float]:
        return {"collected": self.collected, "count": self.count, "version": self.version}
