"""Elastic averaging SGD."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.algorithms._local_steps import LocalSteps, sgd_steps
from ormo_rpc.algorithms.base import LocalWork, PullContext, PushContext
from ormo_rpc.options import option, register


@register("easgd")
@dataclass(kw_only=True)
class EASGD(LocalSteps):
    """Elastic averaging SGD: each worker follows parameters of its own, tied to the centre by a spring.

    Recursion: a ticket is H steps ``w_k <- w_k - eta g`` of worker k from its own ``w_k``. Then, on the server,
    ``delta = a (w_k - w); w <- w + delta; w_k <- w_k - delta``. A worker pushes start minus end of its steps, with the ``eta``
    that its ticket came with, so the learning rate is not applied again. The ``w_k`` live on the server, one that joins starts
    at ``w``. Exchanges keep ``w + sum_k w_k``. Memory: ``w`` and the ``w_k``, ``1 + K`` vectors of D; a worker needs two more
    while it works. The momentum is not read.

    Source: Zhang, Choromanska, LeCun, NeurIPS 2015, arXiv 1412.6651, Algorithm 1 (asynchronous EASGD), with its ``a = 0.9 / K``
        as the default. Departures: the exchange comes right after the H steps, in one with the push, and the next gradient is
        taken after it; the paper takes that one before the exchange.
    """

    elasticity: float | None = option(
        None,
        "a, the part of the way to each other that centre and worker go; default 0.9 / K, K being the gradients in flight",
        valid=lambda v: 0 < v <= 1,
        expected="a number in (0, 1]",
    )

    @override
    def init(self, params: torch.Tensor, momentum: float) -> None:
        super().init(params, momentum)
        self.own: dict[int, torch.Tensor] = {}

    @override
    def step(self, grad: torch.Tensor, lr: float, context: PushContext) -> None:
        own = self.own[context.worker].sub_(grad)
        a = self.elasticity
        delta = (own - self.params).mul_(0.9 / context.concurrency if a is None else a)
        self.params.add_(delta)
        own.sub_(delta)

    @override
    def leave(self, worker: int) -> None:
        self.own.pop(worker, None)

    @override
    def outgoing(self, context: PullContext) -> torch.Tensor:
        if context.worker not in self.own:
            self.own[context.worker] = self.params.clone()
        return self.own[context.worker]

    @override
    def local(self, work: LocalWork, push: torch.Tensor) -> None:
        sgd_steps(work, push)

    @override
    def state_dict(self) -> Mapping[str, torch.Tensor | int | float]:
        return self.by_worker("own", self.own)
