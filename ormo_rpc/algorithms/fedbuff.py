"""Buffered asynchronous aggregation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.algorithms._collected import Collected
from ormo_rpc.algorithms.base import PushContext
from ormo_rpc.options import at_least_one, option, register


@register("fedbuff")
@dataclass(kw_only=True)
class FedBuff(Collected):
    """FedBuff: gradients are collected as they come, whatever their age, and every B of them make one step.

    Recursion: ``G <- G + (1 + s)^-a g``, with ``s`` the staleness, the steps that the server made since the gradient's
    parameters were sent. With the B-th one ``w <- w - eta G / B; G <- 0``. Weights with ``a > 0`` are not normalised. Memory:
    ``w, G``, two vectors of D. The momentum is not read. With B = 1 and ``a = 0`` it is `asgd` bit for bit.

    Source: Nguyen et al., AISTATS 2022, arXiv 2106.06639; the weight with ``a = 1/2`` is that of its experiments.
        Departures: an update is one gradient instead of a client's local steps, and when the run ends a rest of fewer than B
        is applied with the weight ``eta / B`` that each would have had.
    """

    buffer: int = option(4, "B, gradients that make a step", valid=at_least_one, expected="a whole number >= 1")
    staleness_power: float = option(
        0.0,
        "a in the weight (1 + s)^-a of a gradient that missed s steps of the server; 0: all alike",
        valid=lambda v: 0 <= v < float("inf"),
        expected="a finite number >= 0",
    )

    @property
    @override
    def gradients_per_step(self) -> int:
        return self.buffer

    @override
    def step(self, grad: torch.Tensor, lr: float, context: PushContext) -> None:
        staleness = self.version - context.version
        self.collect(grad, lr, (1 + staleness) ** -self.staleness_power)
