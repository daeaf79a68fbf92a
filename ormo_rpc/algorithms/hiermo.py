"""HierMo: Nesterov momentum on workers and on edges, averaged by edges and by a cloud."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.algorithms._regions import RegionRule, TwoLevels
from ormo_rpc.algorithms.base import LocalWork, PullContext, PushContext
from ormo_rpc.options import at_least_one, option, register

RELEASED, WORKING, PUSHED = 0, 1, 2
"""The phase of a worker: free for a ticket of the next round, at work for the present one, or done with it."""


@register("hiermo")
@dataclass(kw_only=True)
class HierMo(TwoLevels):
    """HierMo: edges average parameters and momenta of their workers every tau steps, a cloud those of the edges.

    Worker k belongs to edge k modulo R. A ticket is tau steps ``y' = x - eta g; x = y' + gamma (y' - y); y = y'`` from the
    edge's ``(X, y_e)``, with ``eta`` that of the ticket's issue and ``gamma`` the momentum; the worker pushes how far both
    moved. A worker that has pushed waits until nobody of its edge works any more. Then ``y_e`` is the mean of the ``y``, ``Y'``
    that of the ``x``, and ``X = Y' + gamma_a (Y' - Y); Y = Y'``. After pi such rounds an edge waits for the others, until the
    cloud averages ``X`` and ``y_e``, by the number of pushes, for all edges; ``w`` is that ``X``.

    With a constant gradient a round moves all by ``tau eta g / (1 - gamma - gamma_a)``: ``gamma_a`` has to be less than
    ``1 - gamma``, or it diverges. Whoever holds no ticket is not waited for: a worker that leaves, or finds no more work, ends
    its edge's round, and an edge without workers takes no part. One that joins takes part in its edge's present round, and
    waits with an edge that waits. Memory: ``w``, and five vectors of D for each edge; a worker needs four more. Messages carry
    two vectors both ways.

    With ``region_workers`` each worker of the server, the cloud, is an edge: a server of its own with that many workers
    (`RegionServer`). A ticket is then pi times that many of theirs, at one ``eta``, and its push is how far the edge's ``X``
    and ``y_e`` moved in them. Both servers have this rule: the cloud's has one edge without momentum, whose round is one push
    of each worker; an edge's never comes to a round of a cloud. Edges then count alike, however many gradients came from each,
    and what an edge loses of its workers it makes up by further rounds. ``Y`` is lost with an edge; one that joins begins with
    it at ``X``.

    Source: Yang et al., IEEE TPDS 2023, arXiv 2210.14560. Reconstructed: the full text could not be read here; the bound on
        ``gamma_a`` is derived. Departure: when the run ends, rounds end with those that have pushed.
    """

    VECTORS_PUSHED = 2
    VECTORS_SENT = 2
    REFUSES_MEAN_LR = "a round is with the mean of its pushes already"
    FRESH = True
    NEEDS_IMMEDIATE_REPLIES = "it decides itself who waits for whom, edge by edge; use async"
    REFUSES_PREFETCH = "a round waits for all tickets, those ahead as well"

    local_steps: int = option(
        4, "tau, local steps for each ticket, each on a batch", valid=at_least_one, expected="a whole number >= 1"
    )
    edge_rounds: int = option(
        2, "pi, rounds of each edge between two of the cloud", valid=at_least_one, expected="a whole number >= 1"
    )
    edge_momentum: float = option(
        0.05,
        "gamma_a, the momentum of an edge; it diverges unless it is below 1 - train.momentum",
        valid=lambda v: 0 <= v < 1,
        expected="a number in [0, 1)",
    )

    @property
    @override
    def region_parts(self) -> int:
        return self.edge_rounds * (self.region_workers or 1)

    @override
    def region_rule(self) -> RegionRule:
        own = ("regions", "region_workers")
        return HierMoEdge(**{name: getattr(self, name) for name in self.declared() if name not in own})

    @override
    def init(self, params: torch.Tensor, momentum: float) -> None:
        super().init(params, momentum)
        self.edges, self.most_rounds, self.pull = self.regions, float(self.edge_rounds), self.edge_momentum
        if self.workers_are_regions:  # each of them has had its rounds
            self.edges, self.most_rounds, self.pull = 1, 1.0, 0.0
        edges = range(self.edges)
        self.x = {edge: params.clone() for edge in edges}
        """``X``."""
        self.y = {edge: params.clone() for edge in edges}
        """``y_e``."""
        self.mean = {edge: params.clone() for edge in edges}
        """``Y``, the mean of the workers' ``x`` before the newest step of the edge's momentum."""
        self.moved_x = {edge: self.zeros() for edge in edges}
        """The sum of what was pushed in the present round."""
        self.moved_y = {edge: self.zeros() for edge in edges}
        self.arrived = dict.fromkeys(edges, 0)
        """Pushes in the present round."""
        self.rounds = dict.fromkeys(edges, 0)
        """Rounds since the cloud's newest one; with pi of them the edge waits."""
        self.weight = dict.fromkeys(edges, 0)
        """Pushes in those rounds."""
        self.phase: dict[int, int] = {}
        """The phase of each worker that has had a ticket."""

    @override
    def step(self, grad: torch.Tensor, lr: float, context: PushContext) -> None:
        edge = context.worker % self.edges
        moved_x, moved_y = grad.split(self.params.numel())
        self.moved_x[edge].add_(moved_x)
        self.moved_y[edge].add_(moved_y)
        self.arrived[edge] += 1
        self.phase[context.worker] = PUSHED
        self._end_rounds()
        if all(self.rounds[worker % self.edges] == self.most_rounds for worker in self.phase):
            self._average()

    @override
    def held(self) -> Collection[int]:
        return [worker for worker, phase in self.phase.items() if phase == PUSHED]

    @override
    def flush(self, lr: float) -> None:
        for edge in range(self.edges):
            self._end_round(edge)
        self._average()

    @override
    def join(self, worker: int) -> None:
        if self.rounds[worker % self.edges] >= self.most_rounds:  # what it would be sent is of a round that is over
            self.phase[worker] = PUSHED

    @override
    def leave(self, worker: int) -> None:
        self.phase.pop(worker, None)
        self._end_rounds()  # the cloud's waits for the next push, as it changes w

    def _end_rounds(self) -> None:
        """End the round of each edge of which nobody works any more, unless it waits for the cloud."""
        working = {worker % self.edges for worker, phase in self.phase.items() if phase == WORKING}
        for edge in range(self.edges):
            if edge not in working and self.rounds[edge] < self.most_rounds:
                self._end_round(edge)
                if self.rounds[edge] < self.most_rounds:
                    self._release(edge)

    def _end_round(self, edge: int) -> None:
        pushes = self.arrived[edge]
        if pushes == 0:
            return
        mean = self.x[edge].sub_(self.moved_x[edge], alpha=1 / pushes)
        former = self.mean[edge]
        self.mean[edge] = mean.clone()
        mean.add_(mean - former, alpha=self.pull)
        self.y[edge].sub_(self.moved_y[edge], alpha=1 / pushes)
        self.moved_x[edge].zero_()
        self.moved_y[edge].zero_()
        self.weight[edge] += pushes
        self.arrived[edge] = 0
        self.rounds[edge] += 1

    def _average(self) -> None:
        """Make the cloud's round, and release everybody."""
        total = sum(self.weight.values())
        if total == 0:
            return
        x, y = self.zeros(), self.zeros()
        for edge, weight in self.weight.items():
            x.add_(self.x[edge], alpha=weight / total)
            y.add_(self.y[edge], alpha=weight / total)
        for edge in range(self.edges):
            self.x[edge].copy_(x)
            self.y[edge].copy_(y)
            if self.weight[edge] == 0:
                self.mean[edge].copy_(x)
            self.rounds[edge] = self.weight[edge] = 0
            self._release(edge)
        self.params.copy_(x)

    def _release(self, edge: int) -> None:
        for worker, phase in self.phase.items():
            if worker % self.edges == edge and phase == PUSHED:
                self.phase[worker] = RELEASED

    @override
    def outgoing(self, context: PullContext) -> torch.Tensor:
        edge = context.worker % self.edges
        self.phase[context.worker] = WORKING
        return torch.cat([self.x[edge], self.y[edge]])

    @override
    def local(self, work: LocalWork, push: torch.Tensor) -> None:
        x, y = work.sent.clone().split(work.dimension)
        grad, ahead = torch.empty_like(x), torch.empty_like(x)
        for step in range(work.steps):
            work.gradient(x, step, grad)
            torch.sub(x, grad, alpha=work.lr, out=ahead)
            x.copy_(ahead).add_(ahead - y, alpha=work.momentum)
            y.copy_(ahead)
        push.copy_(work.sent)
        push.sub_(torch.cat([x, y]))

    @override
    def state_dict(self) -> Mapping[str, torch.Tensor | int | float]:
        return {
            **self.by_worker("x", self.x),
            **self.by_worker("y", self.y),
            **self.by_worker("mean", self.mean),
            **self.by_worker("moved_x", self.moved_x),
            **self.by_worker("moved_y", self.moved_y),
            **self.by_worker("arrived", self.arrived),
            **self.by_worker("rounds", self.rounds),
            **self.by_worker("weight", self.weight),
            **self.by_worker("phase", self.phase),
        }


@dataclass(kw_only=True)
class HierMoEdge(HierMo, RegionRule):
    """The rule of an edge's own server: rounds of one edge without end, of which its ticket decides how many there are."""

    @override
    def init(self, params: torch.Tensor, momentum: float) -> None:
        self.regions = 1
        super().init(params, momentum)
        self.most_rounds = math.inf
        self.merged = torch.cat([params, params])

    @override
    def merge(self, sent: torch.Tensor) -> None:
        self.merged.copy_(sent)
        x, y = self.merged.split(self.params.numel())
        self.x[0].copy_(x)
        self.y[0].copy_(y)

    @override
    def displacement(self) -> torch.Tensor:
        # One whose push was refused counts as working, though there was nothing left for it: nobody is waited for any more.
        self._end_round(0)
        self._release(0)
        return self.merged - torch.cat([self.x[0], self.y[0]])
