"""Assignments of tickets to workers: new, outstanding, committed, or to be done again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from ormo_rpc.errors import PushRefused
from ormo_rpc.messages import Push


@dataclass(frozen=True, slots=True)
class Assignment:
    """A ticket in the hands of a worker.

    Attributes:
        ticket: The unit of work.
        worker: The worker that holds it.
        stamp: The index of the parameters that were sent with it.
        bucket: The bucket of that index.
        version: `Algorithm.version` at that moment.
        loss_scale: `Reply.loss_scale`.
        lr: `Reply.lr`; None in a state that does not have it.
    """

    ticket: int
    worker: int
    stamp: int
    bucket: int
    version: int = 0
    loss_scale: float = 1.0
    lr: float | None = None


class Assignments:
    """Hands out the tickets 0, 1, ..., total - 1, each to be committed exactly once.

    A ticket is *new*, then *outstanding* with one worker, then *committed*; or it comes back (its holder left, its gradient was
    discarded, refused or cancelled) and is handed out again before any new one.

    Args:
        total: The number of tickets; None for no end.
        process_of: Maps a worker to its process: a fault of one worker is expected of all workers of its process.
    """

    def __init__(self, total: int | None, process_of: Callable[[int], int] = lambda worker: worker) -> None:
        self.total = total
        self.process_of = process_of
        self.issued = 0
        """Tickets below this number have been handed out at least once."""
        self.committed = 0
        self.outstanding: dict[int, Assignment] = {}
        self.holding: dict[int, set[int]] = {}
        """The tickets of each worker that holds any."""
        self.returned: deque[int] = deque()
        """Tickets to be done again, oldest first."""
        self.deferred: list[int] = []
        """Tickets to be done again when `close` was called: not handed out in this incarnation."""
        self.revoked: set[tuple[int, int, int]] = set()
        """(ticket, worker, stamp) taken away from a worker that may still push: one entry per loss, never removed."""
        self.refused_by: dict[int, set[int]] = {}
        """By ticket, until it is committed: the workers whose gradient for it was not finite."""

    @property
    def done(self) -> bool:
        """True once every ticket is committed."""
        return self.committed == self.total

    @property
    def exhausted(self) -> bool:
        """True while no ticket can be handed out."""
        return not self.returned and self.total is not None and self.issued >= self.total

    def assign(
        self, worker: int, stamp: int, bucket: int, version: int, members: Collection[int], loss_scale: float, lr: float
    ) -> Assignment | None:
        """Hand out the next ticket; None if there is none for this worker now.

        A ticket whose gradient was not finite goes to a worker of another process, as long as there is one.
        """
        ticket = next((t for t in self.returned if self._may_have(worker, t, members)), None)
        if ticket is not None:
            self.returned.remove(ticket)
        elif self.total is None or self.issued < self.total:
            ticket = self.issued
            self.issued += 1
        else:
            return None
        assignment = Assignment(ticket, worker, stamp, bucket, version, loss_scale, lr)
        self.outstanding[ticket] = assignment
        self.holding.setdefault(worker, set()).add(ticket)
        return assignment

    def grant(self, tickets: Iterable[int]) -> None:
        """Queue tickets of another server's, for one that issues none of its own."""
        self.returned.extend(tickets)

    def match(self, push: Push, iteration: int) -> Assignment | None:
        """Return the assignment that a push answers; None when it was revoked, and the push is to be dropped.

        Raises:
            PushRefused: the push answers no assignment.
        """
        ticket, worker, stamp = push.ticket, push.worker, push.stamp
        assignment = self.outstanding.get(ticket)
        if assignment is not None and assignment.worker == worker and assignment.stamp == stamp:
            if assignment.loss_scale == push.loss_scale:
                return assignment
            raise PushRefused(
                f"push of worker {worker} for ticket {ticket}: loss_scale: got {push.loss_scale:g}, expected "
                f"{assignment.loss_scale:g}, that of the reply"
            )
        if (ticket, worker, stamp) in self.revoked:
            return None
        sender = f"push of worker {worker}"
        if not 0 <= ticket < self.issued:
            raise PushRefused(f"{sender}: ticket: got {ticket}, expected one that was issued, below {self.issued}")
        if not 0 <= stamp <= iteration:
            raise PushRefused(
                f"{sender} for ticket {ticket}: stamp: got {stamp}, expected one from 0 to the server's iteration {iteration}"
            )
        if assignment is None:
            raise PushRefused(
                f"{sender}: ticket: got {ticket}, which is settled already; only a worker's newest push may be repeated"
            )
        if assignment.worker != worker:
            raise PushRefused(
                f"{sender}: ticket: got {ticket}, which is held by worker {assignment.worker}; push for a ticket of your own"
            )
        raise PushRefused(f"{sender} for ticket {ticket}: stamp: got {stamp}, expected {assignment.stamp}, that of the reply")

    def commit(self, assignment: Assignment) -> None:
        """Note that the gradient of a ticket is applied."""
        self._remove(assignment)
        self.committed += 1
        self.refused_by.pop(assignment.ticket, None)

    def requeue(self, assignment: Assignment, *, refused: bool = False) -> None:
        """Queue a ticket to be done again; ``refused`` if its gradient was not finite."""
        self._remove(assignment)
        self.returned.append(assignment.ticket)
        if refused:
            self.refused_by.setdefault(assignment.ticket, set()).add(assignment.worker)

    def take_back(self, worker: int) -> list[Assignment]:
        """Requeue all tickets of a worker, which will not push for them any more."""
        issues = [self.outstanding[ticket] for ticket in sorted(self.holding.get(worker, ()))]
        for assignment in issues:
            self.requeue(assignment)
        return issues

    def revoke(self, worker: int) -> list[Assignment]:
        """Requeue all tickets of a worker that has left; a late push for one of them will be dropped."""
        issues = self.take_back(worker)
        self.revoked.update((assignment.ticket, worker, assignment.stamp) for assignment in issues)
        return issues

    def close(self) -> None:
        """Hand out no ticket except outstanding ones that come back; a server resumed from this state does the rest."""
        self.deferred.extend(self.returned)
        self.returned.clear()
        self.total = self.committed + len(self.outstanding)

    def state_dict(self) -> dict[str, Any]:
        """Return a private copy, of plain values only."""
        return {
            "total": self.total,
            "issued": self.issued,
            "committed": self.committed,
            "outstanding": [asdict(assignment) for assignment in self.outstanding.values()],
            "returned": [*self.deferred, *self.returned],
            "revoked": sorted(self.revoked),
            "refused_by": {ticket: sorted(workers) for ticket, workers in self.refused_by.items()},
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], process_of: Callable[[int], int] = lambda worker: worker) -> Assignments:
        """Restore the assignments that `state_dict` returned."""
        assignments = cls(state["total"], process_of)
        assignments.issued, assignments.committed = state["issued"], state["committed"]
        assignments.returned.extend(state["returned"])
        assignments.revoked.update((ticket, worker, stamp) for ticket, worker, stamp in state["revoked"])
        assignments.refused_by = {ticket: set(workers) for ticket, workers in state["refused_by"].items()}
        for fields in state["outstanding"]:
            assignment = Assignment(**fields)
            assignments.outstanding[assignment.ticket] = assignment
            assignments.holding.setdefault(assignment.worker, set()).add(assignment.ticket)
        return assignments

    def _may_have(self, worker: int, ticket: int, members: Collection[int]) -> bool:
        refused_by = {self.process_of(each) for each in self.refused_by.get(ticket, ())}
        return self.process_of(worker) not in refused_by or all(self.process_of(member) in refused_by for member in members)

    def _remove(self, assignment: Assignment) -> None:
        del self.outstanding[assignment.ticket]
        tickets = self.holding[assignment.worker]
        tickets.remove(assignment.ticket)
        if not tickets:
            del self.holding[assignment.worker]
