"""Memberships: which worker process has which worker number, from being let in until it is gone.

A number belongs to one process at a time. The *session_id* of a membership is what its process proves with that it was let in; it comes
with every call, and dies with the membership, so what a process sends that was given up, or that knew another life of the server, is
recognised for certain.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field


@dataclass(eq=False)
class Membership:
    """A worker process that was let in.

    Attributes:
        worker: Its worker number.
        process: Its process number, on its machine.
        host: Its machine.
        slot: Who keeps the process running: a replacement has the same one. Empty for nobody.
        session_id: What it proves with that it was let in.
        joined: Whether it is a member, that is, may hold a ticket.
        leaving: Whether it has asked to leave after the ticket that it holds.
        not_finite: How many of its gradients in a row were not finite.
    """

    worker: int
    process: int
    host: str
    slot: str
    session_id: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)
    joined: bool = False
    leaving: bool = False
    not_finite: int = 0

    def __str__(self) -> str:
        return f"worker {self.worker} (pid {self.process} on {self.host})"


class Memberships:
    """All memberships that are taken.

    Args:
        num_workers: Numbers below this one are for workers that the run itself started, so a guest gets a larger one.
    """

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self.by_session: dict[str, Membership] = {}
        self.by_worker: dict[int, Membership] = {}

    def __len__(self) -> int:
        return len(self.by_worker)

    def holder(self, wanted: int | None, slot: str) -> Membership | None:
        """Who has to go before a process of that slot gets the number that it wants: the process that it replaces."""
        membership = None if wanted is None else self.by_worker.get(wanted)
        return membership if membership is not None and slot and membership.slot == slot else None

    def take(self, wanted: int | None, process: int, host: str, slot: str) -> Membership:
        """Membership a process: at the number that it wants where that is free, else at the lowest one for guests."""
        worker = self.num_workers if wanted is None or wanted in self.by_worker else wanted
        while worker in self.by_worker:
            worker += 1
        membership = Membership(worker, process, host, slot)
        self.by_session[membership.session_id] = self.by_worker[worker] = membership
        return membership

    def free(self, membership: Membership) -> None:
        """The process is gone, and its session_id worth nothing."""
        del self.by_session[membership.session_id], self.by_worker[membership.worker]
