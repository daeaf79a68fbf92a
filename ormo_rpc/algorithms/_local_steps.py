"""Local steps of a worker, for algorithms whose push is how far they lead."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.algorithms.base import Algorithm, LocalWork
from ormo_rpc.options import at_least_one, option


@dataclass(kw_only=True)
class LocalSteps(Algorithm):
    """An algorithm whose workers take H local steps for each ticket."""

    local_steps: int = option(
        4, "H, local steps for each ticket, each on a batch", valid=at_least_one, expected="a whole number >= 1"
    )

    @property
    @override
    def steps(self) -> int:
        return self.local_steps


def sgd_steps(work: LocalWork, push: torch.Tensor, *, momentum: float = 0.0, rate: float | None = None) -> None:
    """Take the steps ``v <- momentum v + g; x <- x - eta v`` of a ticket from the first vector that was sent and ``v = 0``.

    What is pushed is the sum of their moves, start minus end, without the rounding of a difference. The last ticket of
    an epoch may have fewer samples: H smaller batches, or fewer than H of one sample each.

    Args:
        work: The ticket.
        push: Set to the sum, shape (D,).
        momentum: That of the local steps, from 0 at each ticket.
        rate: The learning rate of the sum where it differs from that of the steps.
    """
    grad, here = torch.empty_like(push), work.sent[: work.dimension].clone()
    velocity = torch.zeros_like(push) if momentum else grad
    push.zero_()
    for step in range(work.steps):
        work.gradient(here, step, grad)
        if momentum:
            velocity.mul_(momentum).add_(grad)
        push.add_(velocity, alpha=work.lr if rate is None else rate)
        here.sub_(velocity, alpha=work.lr)
