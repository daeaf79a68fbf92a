"""Local SGD and DiLoCo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.algorithms._local_steps import sgd_steps
from ormo_rpc.algorithms._rounds import Rounds
from ormo_rpc.algorithms.base import LocalWork
from ormo_rpc.options import at_least_one, option, register


@register("local_sgd")
@dataclass(kw_only=True)
class LocalSGD(Rounds):
    """Local SGD: each worker takes H steps of momentum SGD from the same parameters, and their mean is the next step.

    A ticket is H steps ``v <- beta v + g; x <- x - eta v`` from ``x = w, v = 0``, with the ``eta`` that it came with; its push
    is ``w - x``. With those of all workers, whose mean is ``d``: ``u <- mu u + d; w <- w - a (d + mu u)``, or ``w <- w - a u``
    without ``outer_nesterov``: ``torch.optim.SGD`` with the outer learning rate ``a`` and momentum ``mu`` on the outer gradient
    ``d``. With a = 1 and mu = 0 the parameters are averaged (local SGD); DiLoCo has a = 0.7 and mu = 0.9. With H = 1 as well it
    is synchronous SGD on the mean, without momentum.

    ``train.momentum`` is that of the local steps, which each ticket begins anew. Memory: ``w, u`` and the sum of the pushes,
    three vectors of D, and three more for a worker.

    Source: Stich 2018, arXiv 1805.09767 (local SGD); Douillard et al. 2023, arXiv 2311.08105, Algorithm 1 (DiLoCo). Departures:
        DiLoCo's workers take AdamW steps, and keep their inner state from round to round; here a worker keeps nothing.
    """

    local_steps: int = option(
        4, "H, local steps for each ticket, each on a batch", valid=at_least_one, expected="a whole number >= 1"
    )
    outer_lr: float = option(
        1.0,
        "a, the part of the way to the workers' mean that the parameters go",
        valid=lambda v: 0 < v < float("inf"),
        expected="a finite number > 0",
    )
    outer_momentum: float = option(
        0.0, "mu, the momentum of the means", valid=lambda v: 0 <= v < 1, expected="a number in [0, 1)"
    )
    outer_nesterov: bool = option(True, "Nesterov momentum of the means in place of heavy ball")

    @property
    @override
    def steps(self) -> int:
        return self.local_steps

    @override
    def init(self, params: torch.Tensor, momentum: float) -> None:
        super().init(params, momentum)
        self.u = torch.zeros_like(params)

    @override
    def advance(self, mean: torch.Tensor, lr: float) -> None:
        self.u.mul_(self.outer_momentum).add_(mean)
        self.params.sub_(mean.add_(self.u, alpha=self.outer_momentum) if self.outer_nesterov else self.u, alpha=self.outer_lr)

    @override
    def local(self, work: LocalWork, push: torch.Tensor) -> None:
        sgd_steps(work, push, momentum=work.momentum)

    @override
    def state_dict(self) -> Mapping[str, torch.Tensor | int | float]:
        return {**super().state_dict(), "u": self.u}
