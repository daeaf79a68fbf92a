"""m-synchronous SGD: synchronous SGD with backup workers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.algorithms._momentum import GradientMomentum
from ormo_rpc.algorithms._rounds import Rounds
from ormo_rpc.algorithms.base import PullContext, PushContext
from ormo_rpc.options import option, register


@register("m_sync")
@dataclass(kw_only=True)
class MSync(Rounds, GradientMomentum):
    """m-synchronous SGD: a step with the mean of the first m workers' gradients that were taken at the present parameters.

    Recursion: the first gradient of each of the first m distinct workers is collected, ``G <- G + g``, and its worker waits.
    With the m-th one ``v <- beta v + G/m; w <- w - eta v``, or ``w <- w - eta (G/m + beta v)`` with ``nesterov``, and they are
    answered together. A gradient of an earlier round is discarded, its worker gets the present parameters; with ``cancel``
    (simulated only) it gets them as soon as the round ends, and what it was computing is given up.

    The learning rate is that of the round's last gradient. With m = null all workers make up a round, which is synchronous
    data-parallel SGD: ``torch.optim.SGD`` on the mean of their gradients, bit for bit, for any schedule. Its tickets are those
    of `ormo` under `sync`, and with ``train.lr_scaling=mean`` there its parameters too, up to rounding, while ``eta`` is
    constant. A round of fewer than m gradients, as no further worker computes, has their mean. Memory: ``w, v, G``, three
    vectors of D.

    Source: arXiv 2602.03802 (m-synchronous SGD; reconstructed from its abstract); Chen et al. 2016, arXiv 1604.00981 (backup
        workers). Departure: the momentum, ours.
    """

    m: int | None = option(
        None,
        "gradients that make a step, each of another worker; default: those of all workers",
        valid=lambda v: v >= 1,
        expected="a whole number >= 1, or null",
    )
    nesterov: bool = option(False, "Nesterov momentum in place of heavy ball")
    cancel: bool = option(False, "end what the others compute when a round ends; in simulations only")

    @property
    @override
    def round_size(self) -> int | None:
        return self.m

    @property
    @override
    def whole_rounds(self) -> bool:
        return self.m is None

    @property
    @override
    def cancels(self) -> bool:
        return self.cancel

    @override
    def init(self, params: torch.Tensor, momentum: float) -> None:
        super().init(params, momentum)
        self.v = torch.zeros_like(params)
        self.working: dict[int, int] = {}
        """The version that a worker has its ticket of, where they are cancelled."""

    @override
    def advance(self, mean: torch.Tensor, lr: float) -> None:
        self.v.mul_(self.momentum).add_(mean)
        self.params.sub_(mean.add_(self.v, alpha=self.momentum) if self.nesterov else self.v, alpha=lr)

    @override
    def step(self, grad: torch.Tensor, lr: float, context: PushContext) -> None:
        self.working.pop(context.worker, None)
        super().step(grad, lr, context)

    @override
    def outgoing(self, context: PullContext) -> torch.Tensor:
        if self.cancel:
            self.working[context.worker] = self.version
        return super().outgoing(context)

    @override
    def cancelled(self) -> Collection[int]:
        return [worker for worker, version in self.working.items() if version < self.version]

    @override
    def leave(self, worker: int) -> None:
        super().leave(worker)
        self.working.pop(worker, None)

    @override
    def state_dict(self) -> Mapping[str, torch.Tensor | int | float]:
        return {**super().state_dict(), "v": self.v, **self.by_worker("working", self.working)}
