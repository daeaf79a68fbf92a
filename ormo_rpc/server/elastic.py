"""Elastic consistency: how far the parameters have moved since they were sent, in units of the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ormo_rpc.algorithms.base import PushContext

CHUNK = 1 << 16
"""Elements that a processor compares at a time, so that their difference stays in its cache and costs no pass over memory."""


@dataclass(frozen=True)
class ElasticConsistency:
    """Measures ``||w_t - w_i||^2 / eta^2`` at every n-th applied gradient, before its step.

    ``w_t`` are the parameters as they stand, ``w_i`` the first D values that were sent with the ticket, in the parameters'
    dtype: of an algorithm that sends an estimate, that estimate. ``eta`` is the scheduled learning rate of iteration t. Memory:
    two chunks, on a GPU two vectors of D; what was sent is kept for the worker's push anyway.

    Source: the quantity that Nadiradze et al. 2021, arXiv 2001.05918, assume to be bounded.

    Attributes:
        every: n; measured at the n-th gradient, the 2n-th, and so on, not at the first, before which ``w`` has not moved. With
            a divisor or multiple of K it may always meet the same worker, or the same place in a round.
    """

    every: int

    def measure(self, params: torch.Tensor, context: PushContext) -> float | None:
        """Return the value for a gradient that is about to be applied.

        None between measurements, where what was sent is not known, with a learning rate of 0, and where it is not finite.
        """
        if (context.iteration + 1) % self.every or context.sent is None or context.lr == 0:
            return None
        with torch.no_grad():
            sent = context.sent[: params.numel()]
            chunk = CHUNK if params.device.type == "cpu" else params.numel()  # each result is waited for
            total = 0.0
            for ours, theirs in zip(params.split(chunk), sent.split(chunk), strict=True):
                moved = ours - theirs.to(params.dtype)
                total += torch.dot(moved, moved).item()
        value = total / context.lr**2
        return value if math.isfinite(value) else None
