"""The start of a run: no ticket is issued before the expected workers have registered."""

from __future__ import annotations

import threading

from ormo_rpc.control.memberships import Membership


class StartBarrier:
    """The workers that are expected, and those that have registered; the service's lock guards both.

    Args:
        num_workers: Workers 0, 1, ... up to this number are expected.

    Attributes:
        registered: Memberships that wait for the start, in the order in which they came.
        passed: Set once the first tickets are handed out; read without the lock.
    """

    def __init__(self, num_workers: int) -> None:
        self._expected = set(range(num_workers))
        self.registered: list[Membership] = []
        self.passed = threading.Event()

    @property
    def complete(self) -> bool:
        """True when at least one worker has registered, and all expected ones have."""
        return bool(self.registered) and {membership.worker for membership in self.registered} >= self._expected

    def add(self, membership: Membership) -> None:
        """Register a worker; a repetition has no effect."""
        if membership not in self.registered:
            self.registered.append(membership)

    def remove(self, membership: Membership) -> None:
        """Remove a worker whose membership has ended; it is still expected."""
        if membership in self.registered:
            self.registered.remove(membership)

    def stop_expecting(self, worker: int) -> None:
        """Start without a worker."""
        self._expected.discard(worker)

    def take(self) -> list[Membership]:
        """Empty the barrier, and return those that had registered."""
        registered, self.registered = self.registered, []
        return registered
