"""The monitor: every process that this launcher has to keep at work, and a replacement for each one that dies."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from ormo_rpc.runtimes.distributed.launcher.supervisor import DONE, EXIT_NO_RESTART, Child, Supervisor

LONGEST_BACKOFF_SECONDS = 30.0
"""The pause before a restart doubles each time, up to this."""
LONG_LIFE_SECONDS = 300.0
"""After a life of at least this, the pause is the first one again."""


@dataclass
class ProcessSlot:
    """A place in the monitor: the server's, or a worker's.

    Attributes:
        name: For messages.
        worker: The worker number; None for the server's, and a guest's.
        start: ``start(life)`` starts the child that fills it; lives count from 0.
        restartable: Whether a child that ended in this way is replaced.
        essential: The run does not go on without it, so giving it up is not told here but by whoever ends the run.
        child: Who fills it; None between two lives.
        lives: How many children it has had.
        failures: How many of them in a row have ended soon.
        began: When the present one was started, on the monotonic clock.
        due: When the next one starts, on the monotonic clock.
        exit_reason: How the last child ended, where it was not by having done its work.
        done: Its work is done.
        given_up: Nobody will fill it any more.
    """

    name: str
    worker: int | None
    start: Callable[[int], Child]
    restartable: Callable[[Child], bool]
    essential: bool
    child: Child | None = None
    lives: int = 0
    failures: int = 0
    began: float = 0.0
    due: float = 0.0
    exit_reason: str = ""
    done: bool = False
    given_up: bool = False

    @property
    def over(self) -> bool:
        """Nobody fills it, and nobody will."""
        return self.done or self.given_up


def killed_or_failed(child: Child) -> bool:
    """Restart a worker whatever it died of, unless it was dismissed or refused."""
    return child.exit_code != EXIT_NO_RESTART


def killed(child: Child) -> bool:
    """Restart the server where something else ended it; an error of its own would come again."""
    return child.exit_code is not None and child.exit_code < 0


class ProcessMonitor:
    """Keeps its slots filled.

    Args:
        supervisor: Starts and watches the children.
        max_restarts: How often each slot is filled again.
        backoff_seconds: The pause before the first restart of a slot; each further one is twice as long, until a life lasts.
        tell: Called with what people should know.
    """

    def __init__(
        self, supervisor: Supervisor, *, max_restarts: int, backoff_seconds: float, tell: Callable[[str], None]
    ) -> None:
        self.supervisor = supervisor
        self.max_restarts = max_restarts
        self.backoff_seconds = backoff_seconds
        self.tell = tell
        self.slots: list[ProcessSlot] = []

    def add(
        self,
        name: str,
        start: Callable[[int], Child],
        *,
        worker: int | None = None,
        restartable: Callable[[Child], bool] = killed_or_failed,
        essential: bool = False,
    ) -> ProcessSlot:
        """Add a slot and fill it."""
        slot = ProcessSlot(name, worker, start, restartable, essential)
        self.slots.append(slot)
        self._fill(slot)
        return slot

    def monitor(self) -> None:
        """Look after every slot once: reap the dead, and start whoever is due."""
        for slot in self.slots:
            if slot.child is not None and not slot.child.running:
                self._reap(slot, slot.child)
            if slot.child is None and not slot.over and time.monotonic() >= slot.due:
                self._fill(slot)

    def _fill(self, slot: ProcessSlot) -> None:
        slot.began = time.monotonic()
        slot.child = slot.start(slot.lives)
        slot.lives += 1

    def _reap(self, slot: ProcessSlot, child: Child) -> None:
        slot.child = None
        self.supervisor.reap(child)
        if child.exit_code == DONE:
            slot.done = True
            return
        slot.exit_reason = child.exit_reason()
        restarts = slot.lives - 1
        exhausted = restarts >= self.max_restarts
        if exhausted or not slot.restartable(child):
            slot.given_up = True
            slot.exit_reason += f"; restarted {restarts} times (runtime.max_restarts)" if exhausted and restarts else ""
            if not slot.essential:
                self.tell(f"{slot.exit_reason}; the run goes on without it")
        else:
            slot.failures = 0 if time.monotonic() - slot.began >= LONG_LIFE_SECONDS else slot.failures + 1
            pause = min(LONGEST_BACKOFF_SECONDS, self.backoff_seconds * 2 ** max(0, slot.failures - 1))
            slot.due = time.monotonic() + pause
            self.tell(f"{slot.exit_reason}; starting it again in {pause:g} s ({restarts + 1} of {self.max_restarts} restarts)")
