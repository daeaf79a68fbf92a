"""Rennala SGD."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.algorithms._collected import Collected
from ormo_rpc.algorithms.base import PushContext
from ormo_rpc.options import at_least_one, option, register


@register("rennala")
@dataclass(kw_only=True)
class Rennala(Collected):
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

    @property
    @override
    def gradients_per_step(self) -> int:
        return self.batch

    @override
    def accepts(self, context: PushContext) -> bool:
        return context.version == self.version

    @override
    def step(self, grad: torch.Tensor, lr: float, context: PushContext) -> None:
        self.collect(grad, lr)
