"""Ordered local momentum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from typing_extensions import override

from ormo_rpc.algorithms._local_steps import LocalSteps
from ormo_rpc.algorithms._momentum import StepMomentum
from ormo_rpc.algorithms.base import LocalWork, PullContext, PushContext
from ormo_rpc.options import option, register


class Combine(Enum):
    """The weight of what each worker brings."""

    sum = "sum"
    """1, as in `ormo`: a round moves the parameters by the sum over its K workers."""
    mean = "mean"
    """1 / K: a round moves the parameters by the mean."""


@register("orlomo")
@dataclass(kw_only=True)
class OrLoMo(LocalSteps, StepMomentum):
    """OrLoMo: workers take H steps of momentum SGD; their local momenta enter the server's in the order of iterations.

    A ticket is H steps ``v <- beta v + eta g; x <- x - v`` from ``x = w``, ``v = u``. They are linear in ``u`` and the worker's
    own gradients: ``v`` ends at ``beta^H u + m``, ``x`` at ``w - (beta + ... + beta^H) u - p``, with
    ``m = sum_h beta^(H-h) eta g_h`` and ``p = sum_h (1 - beta^(H-h+1)) / (1 - beta) eta g_h``, which the worker pushes. The
    server drifts by ``u`` once a round, whoever comes; a push of bucket ``b`` then owes what ``m`` did since its round:

    1. *momentum shift*: while ``I`` is smaller than the largest bucket handed out so far,
       ``w <- w - (beta + ... + beta^H) u; u <- beta^H u; I <- I + 1``;
    2. with ``e = I - b >= 0``: ``u <- u + beta^(H e) m; w <- w - p - beta (1 - beta^(H e)) / (1 - beta) m``.

    With ``combine=mean`` ``m`` and ``p`` are divided by K, the gradients in flight when its ticket was handed out: a worker
    that joins or leaves changes the tickets handed out from then on, and what a lost one would have brought counts as zero.
    Under the synchronous scheduler this is PRSGDm: K workers take H steps from the same parameters and momentum, then both are
    averaged. With ``sum``, the default, H = 1 and constant ``eta`` it is `ormo`.

    Where ``I = b`` already, ``w`` has drifted for this round, and the worker is sent 0 for ``u``: with ``sum``, unless another
    push comes in between, the server's ``w`` is then where the worker ended. With one worker this is momentum SGD, its steps
    on end. ``eta`` is inside of the momentum; it is that of the ticket's issue, and the server does not apply it again.
    Where the momentum is corrected (see `StepMomentum`), ``m`` and ``p`` are brought from that rate to the present one. Memory:
    ``w, u``, two vectors of D, and two more for the worker; messages carry two both ways.

    Source: Shi, Wang, Li, AAAI 2026, arXiv 2601.12322. Reconstructed: only the abstract could be read here; the steps above are
        derived from it and from `ormo`. A ticket of fewer than H batches counts as the last ones of its H steps.
    """

    VECTORS_PUSHED = 2
    VECTORS_SENT = 2

    combine: Combine = option(Combine.sum, "what the workers of a round bring: sum, or mean (as in PRSGDm)")

    @override
    def init(self, params: torch.Tensor, momentum: float) -> None:
        super().init(params, momentum)
        self.u = torch.zeros_like(params)
        self.index = 0
        self.sharers: dict[int, int] = {}
        """K when a worker's ticket was handed out, if they are averaged."""

    @override
    def advance(self, grad: torch.Tensor, lr: float, scale: float, context: PushContext) -> None:
        local_momentum, moved = grad.split(self.params.numel())
        weight = lr / (context.sent_lr or 1.0) if self.momentum_correction else 1.0
        if self.combine is Combine.mean:
            weight /= self.sharers[context.worker]
        if scale != 1.0:
            self.u.mul_(scale)
        while self.index < context.newest_bucket:
            self.params.sub_(self.u, alpha=self._drift(1))
            self.u.mul_(self._decay(1))
            self.index += 1
        rounds = self.index - context.bucket
        self.u.add_(local_momentum, alpha=self._decay(rounds) * weight)
        self.params.sub_(moved, alpha=weight).sub_(local_momentum, alpha=self._drift(rounds) * weight)

    @override
    def leave(self, worker: int) -> None:
        self.sharers.pop(worker, None)

    @override
    def outgoing(self, context: PullContext) -> torch.Tensor:
        if self.combine is Combine.mean:
            self.sharers[context.worker] = context.concurrency
        if self.index >= context.bucket:
            return torch.cat([self.params, torch.zeros_like(self.u)])
        return torch.cat([self.params, self.u * (context.lr / self.momentum_lr) if self.momentum_correction else self.u])

    @override
    def local(self, work: LocalWork, push: torch.Tensor) -> None:
        here, momentum = work.sent.clone().split(work.dimension)
        grad = torch.empty_like(here)
        local_momentum, moved = push.zero_().split(work.dimension)
        rate = work.lr or 1.0 if self.momentum_correction else work.lr
        for step in range(work.steps):
            work.gradient(here, step, grad)
            momentum.mul_(work.momentum).add_(grad, alpha=work.lr)
            here.sub_(momentum)
            local_momentum.mul_(work.momentum).add_(grad, alpha=rate)
            moved.add_(local_momentum)  # p sums m over the steps: 1 + beta + ... + beta^(H-h) for the gradient of step h

    def _decay(self, rounds: int) -> float:
        """Return ``beta^(H rounds)``: the share of a momentum that is left after so many rounds."""
        return self.momentum ** (self.local_steps * rounds)

    def _drift(self, rounds: int) -> float:
        """Return ``beta + ... + beta^(H rounds)``: how far a momentum carries the parameters in so many rounds."""
        return self.momentum * (1 - self._decay(rounds)) / (1 - self.momentum)

    @override
    def state_dict(self) -> Mapping[str, torch.Tensor | int | float]:
        return {"u": self.u, "index": self.index, **self.by_worker("sharers", self.sharers), **super().state_dict()}
