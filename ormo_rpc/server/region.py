"""The server of a region: a parameter server whose tickets are parts of those that it holds as one worker of another server."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from ormo_rpc.algorithms._regions import RegionRule
from ormo_rpc.messages import Push, Reply, weighted_mean_loss
from ormo_rpc.server.answering import answer
from ormo_rpc.server.assignments import Assignments
from ormo_rpc.server.buffer_rules import Rule
from ormo_rpc.server.build import build_server
from ormo_rpc.server.combined_buffers import combine
from ormo_rpc.server.loss_scale import LossScale


@dataclass(eq=False)
class _Open:
    """A ticket of the other server, and what came of its parts so far."""

    reply: Reply
    parts: set[int]
    """Those that are not committed."""
    losses: list[tuple[float | None, int]] = field(default_factory=list[tuple["float | None", int]])
    """Loss and samples of each part."""
    buffers: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])


class RegionServer:
    """A worker of the global server to that server, and the server of its own workers to these.

    A ticket that it holds is divided into parts, the tickets of its workers, which it hands out like any server: those of a
    worker that leaves go to another one. When all parts of a ticket are committed, its push goes to the global server: how far
    the region has moved since it sent last. So each part of the work counts once as long as the region lives. If it dies, its
    tickets are issued again, and its parameters and momentum are lost.

    What its workers report of the model's buffers it reports together. Where they compute in float16, the scale of their losses
    is the region's own; what it pushes itself is not scaled.

    Args:
        algorithm: The rule of the region; copied.
        params: What the other server has sent, one or more vectors of D, the first of which is the parameters to begin with;
            copied.
        num_workers: Its workers.
        parts: The number of parts of a ticket, those of ticket t being t n, t n + 1, ...
        count: From a ticket to the number of its parts that there are; all n by default.
        buffer_rules: The rules of the model's buffers.
        loss_scale: The first scale of the losses of its workers; copied. None for no scale.
    """

    def __init__(
        self,
        algorithm: RegionRule,
        params: torch.Tensor,
        num_workers: int,
        parts: int,
        count: Callable[[int], int] | None = None,
        *,
        buffer_rules: Mapping[str, Rule] | None = None,
        loss_scale: LossScale | None = None,
    ) -> None:
        self.core = build_server(
            algorithm=algorithm,
            params=params[: params.numel() // algorithm.VECTORS_SENT],
            num_workers=num_workers,
            lr=lambda _: self._lr,
            total_tickets=1,
            loss_scale=loss_scale,
        )
        self.core.assignments = Assignments(0)  # it issues no tickets of its own
        assert isinstance(self.core.algorithm, RegionRule)
        self.rule = self.core.algorithm
        self.parts = parts
        self._count = count or (lambda _: parts)
        self._rules = buffer_rules or {}
        self._lr = 0.0
        self._buffers = torch.empty(0, dtype=torch.uint8)
        self._open: dict[int, _Open] = {}
        self.core.start()

    @property
    def ended(self) -> bool:
        """True once it has diverged; another one has to take its place."""
        return self.core.ended

    def grant(self, reply: Reply) -> list[Reply]:
        """Merge with the global parameters, and hand out the parts of the ticket; return the replies that are due."""
        assert reply.ticket is not None, "a reply without a ticket ends the region"
        self.rule.merge(reply.params.to(self.core.params.dtype))
        self.core.snapshots.invalidate()
        self._lr, self._buffers = reply.lr, reply.buffers
        first = reply.ticket * self.parts
        parts = range(first, first + self._count(reply.ticket))
        self._open[reply.ticket] = _Open(reply, set(parts))
        self.core.assignments.grant(parts)
        return self._with_buffers(answer(self.core))

    def receive(self, push: Push) -> tuple[list[Reply], list[Push]]:
        """Settle a worker's push; return the replies that are due, and what is to be pushed to the global server."""
        replies = self._with_buffers(self.core.receive(replace(push, buffers={})))
        if self.ended:
            lost = torch.full_like(self.core.params, math.nan).repeat(self.rule.VECTORS_PUSHED)
            return [], [self._pushed(number, lost) for number in list(self._open)]
        number = push.ticket // self.parts
        ticket = self._open.get(number)
        assignments = self.core.assignments
        if ticket is None or push.ticket in assignments.outstanding or push.ticket in assignments.returned:
            return replies, []  # the gradient was not finite, or the ticket is another region's by now
        if push.ticket in ticket.parts:
            ticket.parts.remove(push.ticket)
            ticket.losses.append((push.loss, push.samples))
            ticket.buffers = combine(self._rules, ticket.buffers, push.buffers)
        if ticket.parts:
            return replies, []
        return replies, [self._pushed(number, self.rule.displacement())]

    def join(self, worker: int) -> list[Reply]:
        """Add a worker of its own."""
        return self._with_buffers(self.core.join(worker))

    def leave(self, worker: int) -> list[Reply]:
        """Remove a worker of its own; others get its tickets."""
        return self._with_buffers(self.core.leave(worker))

    def drop(self, worker: int) -> None:
        """Forget the tickets of one of its memberships in the global server, which has left."""
        self._open = {number: ticket for number, ticket in self._open.items() if ticket.reply.worker != worker}

    def _with_buffers(self, replies: list[Reply]) -> list[Reply]:
        return [replace(reply, buffers=self._buffers) for reply in replies if reply.ticket is not None]

    def _pushed(self, number: int, moved: torch.Tensor) -> Push:
        """Make the push for a ticket of the global server."""
        ticket = self._open.pop(number)
        return Push(
            worker=ticket.reply.worker,
            ticket=number,
            stamp=ticket.reply.stamp,
            grad=moved,
            loss=weighted_mean_loss(ticket.losses),
            samples=max(1, sum(samples for _, samples in ticket.losses)),
            buffers=ticket.buffers,
            incarnation=ticket.reply.incarnation,
            loss_scale=ticket.reply.loss_scale,
        )
