"""Memberships: the worker number of each process, from joining until it leaves or is evicted.

A worker number belongs to one process at a time. The *session id* of a membership authenticates every later call and is void
with the membership, so calls of an evicted process, or of one that joined an earlier incarnation of the server, are recognised.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field


@dataclass(eq=False)
class Membership:
    """A process that has joined.

    Attributes:
        worker: Its worker number.
        pid: Its process id, on its host.
        host: The name of its host.
        slot_id: The process slot that its launcher keeps filled: a replacement comes from the same one. Empty for none.
        session_id: Authenticates its calls.
        joined: True once it may hold a ticket.
        leaving: True once it has asked to leave after the ticket that it holds.
        not_finite: Its consecutive gradients that were not finite.
    """

    worker: int
    pid: int
    host: str
    slot_id: str
    session_id: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)
    joined: bool = False
    leaving: bool = False
    not_finite: int = 0

    def __str__(self) -> str:
        return f"worker {self.worker} (pid {self.pid} on {self.host})"


class Memberships:
    """The current memberships, by worker number and by session id.

    Args:
        num_workers: Numbers below it are for workers that the run itself starts; an elastic worker gets a larger one.
    """

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self.by_session: dict[str, Membership] = {}
        self.by_worker: dict[int, Membership] = {}

    def __len__(self) -> int:
        return len(self.by_worker)

    def replaced_by(self, preferred_worker: int | None, slot_id: str) -> Membership | None:
        """The membership of the process that this one replaces, which was in the same slot; None where there is none."""
        membership = None if preferred_worker is None else self.by_worker.get(preferred_worker)
        return membership if membership is not None and slot_id and membership.slot_id == slot_id else None

    def add(self, preferred_worker: int | None, pid: int, host: str, slot_id: str) -> Membership:
        """Give a process the number that it prefers where that is free, else the lowest free one of elastic workers."""
        taken = preferred_worker is None or preferred_worker in self.by_worker
        worker = self.num_workers if preferred_worker is None or taken else preferred_worker
        while worker in self.by_worker:
            worker += 1
        membership = Membership(worker, pid, host, slot_id)
        self.by_session[membership.session_id] = self.by_worker[worker] = membership
        return membership

    def remove(self, membership: Membership) -> None:
        """Free a worker number and void its session id."""
        del self.by_session[membership.session_id], self.by_worker[membership.worker]
