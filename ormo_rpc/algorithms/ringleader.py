"""Ringleader ASGD."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.algorithms.base import Algorithm, PullContext, PushContext
from ormo_rpc.options import register


@register("ringleader")
@dataclass(kw_only=True)
class Ringleader(Algorithm):
    """Ringleader ASGD: each step is the mean over the workers of their own means, so that all count alike, fast or slow.

    State: ``w``, and two tables of a mean gradient for each worker, CUR and NEXT. A cycle of n workers has two phases:

    1. Until each of the n workers has an entry in CUR, a gradient goes into its worker's mean there, and ``w`` stays. The
       one that completes the table begins phase 2.
    2. A gradient of a worker that has not stepped in this cycle goes into its mean in CUR, and the worker steps:
       ``w <- w - eta (1/n) sum of CUR``. One of a worker that has stepped already goes into NEXT, and ``w`` stays. When all n
       have stepped, NEXT becomes CUR, and a new cycle begins.

    So each worker steps once in a cycle, whatever its speed, and a gradient is at most ``2 n - 2`` steps old when it acts.
    With one worker this is `asgd` to the bit. Every gradient is applied and advances ``t``, most without a step: with workers
    that are alike n gradients of ``2 n - 1`` step.

    The paper holds back the worker that completes phase 1 until phase 2 has begun. Here these are one step of the server, so
    nobody waits, and nobody can wait in vain: a worker that leaves takes its entries with it, and where it was the last one
    that the cycle waited for, the cycle ends (phase 2), or the next gradient begins phase 2 (phase 1). One that joins in
    phase 2 begins with NEXT, and counts in the next cycle. Memory: ``w``, the sum of CUR, and two vectors for each worker,
    ``2 + 2 K`` vectors of D. The momentum is not read.

    Source: Maranjyan et al. 2025, arXiv 2509.22860 (Ringleader ASGD). Departures: workers may join and leave; and when the run
        ends, what has not acted, CUR in phase 1 or NEXT in phase 2, makes a last step, each mean with its weight ``eta / n``.
    """

    REFUSES_MEAN_LR = "its step is with a mean over the workers already"

    @override
    def init(self, params: torch.Tensor, momentum: float) -> None:
        super().init(params, momentum)
        self.total = torch.zeros_like(params)
        """The sum of the means in CUR in phase 2, and zero in phase 1."""
        self.means: dict[int, torch.Tensor] = {}
        """CUR, by worker; zero where it has no entry."""
        self.counts: dict[int, int] = {}
        """The gradients in each mean of CUR."""
        self.next_means: dict[int, torch.Tensor] = {}
        """NEXT."""
        self.next_counts: dict[int, int] = {}
        self.due: dict[int, int] = {}
        """1 for a worker that has yet to step in the present phase 2; all are 0 in phase 1."""

    @override
    def step(self, grad: torch.Tensor, lr: float, context: PushContext) -> None:
        worker = context.worker
        stepping = any(self.due.values())
        if stepping and not self.due[worker]:
            _fold(grad, worker, self.next_means, self.next_counts)
            return
        change = _fold(grad, worker, self.means, self.counts)
        if stepping:
            self.total.add_(change)
        elif all(self.counts.values()):
            self.due = dict.fromkeys(self.due, 1)
            self._sum()
        else:
            return
        self.params.sub_(self.total, alpha=lr / sum(count > 0 for count in self.counts.values()))
        self.due[worker] = 0
        if not any(self.due.values()):
            self._next_cycle()

    def _sum(self) -> None:
        """Make the sum anew, without the rounding that it has gathered."""
        self.total.zero_()
        for mean in self.means.values():
            self.total.add_(mean)

    def _next_cycle(self) -> None:
        """Make NEXT the present table."""
        self.means, self.next_means = self.next_means, self.means
        self.counts, self.next_counts = self.next_counts, dict.fromkeys(self.counts, 0)
        for each in (self.total, *self.next_means.values()):
            each.zero_()

    @override
    def flush(self, lr: float) -> None:
        if any(self.due.values()):
            self.due = dict.fromkeys(self.due, 0)
            self._next_cycle()
        if any(self.counts.values()):
            self._sum()
            self.params.sub_(self.total, alpha=lr / len(self.counts))
            self._next_cycle()

    @override
    def leave(self, worker: int) -> None:
        stepping = any(self.due.values())
        for table in (self.means, self.counts, self.next_means, self.next_counts, self.due):
            table.pop(worker, None)
        if not stepping:
            return
        if any(self.due.values()):
            self._sum()
        else:
            self._next_cycle()

    @override
    def outgoing(self, context: PullContext) -> torch.Tensor:
        if context.worker not in self.means:
            for means in (self.means, self.next_means):
                means[context.worker] = self.zeros()
            for counts in (self.counts, self.next_counts, self.due):
                counts[context.worker] = 0
        return self.params

    @override
    def state_dict(self) -> Mapping[str, torch.Tensor | int | float]:
        return {
            "total": self.total,
            **self.by_worker("means", self.means),
            **self.by_worker("counts", self.counts),
            **self.by_worker("next_means", self.next_means),
            **self.by_worker("next_counts", self.next_counts),
            **self.by_worker("due", self.due),
        }


def _fold(grad: torch.Tensor, worker: int, means: dict[int, torch.Tensor], counts: dict[int, int]) -> torch.Tensor:
    """Take a gradient into the mean of its worker in a table; return the change of the mean, shape (D,)."""
    counts[worker] += 1
    change = (grad - means[worker]).div_(counts[worker])
    means[worker].add_(change)
    return change
