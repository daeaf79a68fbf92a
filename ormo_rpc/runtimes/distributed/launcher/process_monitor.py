"""The process monitor: keeps each process slot of this launcher filled, and restarts processes that die, with a back-off."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from signal import Signals

from ormo_rpc.runtimes.distributed.launcher.child import EXIT_DONE, EXIT_NO_RESTART, EXIT_SERVER_LOST
from ormo_rpc.runtimes.distributed.launcher.supervisor import ChildProcess, Supervisor
from ormo_rpc.runtimes.distributed.oom_kills import OomKills
from ormo_rpc.runtimes.distributed.shortages import MEMORY, reason_of_start
from ormo_rpc.signals import ending_signal

MAX_BACKOFF_SECONDS = 30.0
"""The pause before a restart doubles each time, up to this."""
BACKOFF_RESET_SECONDS = 300.0
"""After a process has run for this time, the pause is the first one again."""
SIGNAL_SECONDS = 0.5
"""Time in which the launcher gets the signal that has ended a process, where a manager sends it to all of them."""


@dataclass
class ProcessSlot:
    """A role that a process fills: the server's, or a worker's.

    Attributes:
        name: For messages.
        worker: The worker number; None for the server and for an elastic worker.
        start: ``start(restart_count)`` starts the process that fills the slot, or raises an `OSError`.
        should_restart: Decides from the exit status of a process whether it is replaced.
        essential: The run ends with it, and the run's last message has the reason.
        child: The process that fills it; None between two of them.
        restart_count: Processes that have filled it before the present one.
        failures: Consecutive processes that did not run for `BACKOFF_RESET_SECONDS`.
        started_at: Start of the newest process, on the monotonic clock.
        restart_at: Start of the next one, on the monotonic clock.
        exit_reason: How the last process ended, unless its work was done.
        death: The same for the server: process id, and how it ended.
        done: Its work is done.
        ended_at: The end of the present process was noticed then, on the monotonic clock; None while it runs.
        left_on: The signal on which the last process ended in order, before its work was done; it counts as done.
        exit_code: The exit status of the last process.
        joined: A process of it that has ended was a member of the run.
        given_up: It stays empty, though its work is not done.
    """

    name: str
    worker: int | None
    start: Callable[[int], ChildProcess]
    should_restart: Callable[[ChildProcess], bool]
    essential: bool
    child: ChildProcess | None = None
    restart_count: int = 0
    failures: int = 0
    started_at: float = 0.0
    restart_at: float = 0.0
    exit_reason: str = ""
    death: tuple[int, str] | None = None
    exit_code: int | None = None
    done: bool = False
    ended_at: float | None = None
    left_on: Signals | None = None
    joined: bool = False
    given_up: bool = False

    @property
    def finished(self) -> bool:
        """True once it stays empty."""
        return self.done or self.given_up


def unless_banned(child: ChildProcess) -> bool:
    """Restart a worker however it ended, unless it was banned or refused."""
    return child.exit_code != EXIT_NO_RESTART


def unless_server_lost(child: ChildProcess) -> bool:
    """Restart a worker unless it was banned or refused, or has looked for its server for long enough."""
    return unless_banned(child) and child.exit_code != EXIT_SERVER_LOST


def if_killed(child: ChildProcess) -> bool:
    """Restart a process that was killed by a signal; an error of its own would come again."""
    return child.exit_code is not None and child.exit_code < 0


class ProcessMonitor:
    """Keeps its slots filled; a process that cannot be started counts as one that has died.

    Args:
        supervisor: Starts and watches the processes.
        max_restarts: Restarts of each slot.
        backoff_seconds: The pause before the first restart of a slot; it doubles with each restart.
        report: Called with messages for people.
    """

    def __init__(
        self, supervisor: Supervisor, *, max_restarts: int, backoff_seconds: float, report: Callable[[str], None]
    ) -> None:
        self.supervisor = supervisor
        self.max_restarts = max_restarts
        self.backoff_seconds = backoff_seconds
        self.report = report
        self.oom_kills = OomKills()
        self.slots: list[ProcessSlot] = []

    def add(
        self,
        name: str,
        start: Callable[[int], ChildProcess],
        *,
        worker: int | None = None,
        should_restart: Callable[[ChildProcess], bool] = unless_banned,
        essential: bool = False,
    ) -> ProcessSlot:
        """Add a slot and fill it."""
        slot = ProcessSlot(name, worker, start, should_restart, essential)
        self.slots.append(slot)
        self._start(slot)
        return slot

    def poll(self) -> None:
        """Reap exited processes; restart those whose back-off has elapsed."""
        ended = [child for slot in self.slots if (child := slot.child) is not None and self._has_ended(slot, child)]
        self._explain(ended)
        for slot in self.slots:
            if slot.child is not None and slot.child in ended:
                self._reap(slot, slot.child)
            if slot.child is None and not slot.finished and time.monotonic() >= slot.restart_at:
                self.refill(slot)

    def refill(self, slot: ProcessSlot) -> None:
        """Start the next process of a slot, without a pause."""
        slot.restart_count += 1
        self._start(slot)

    def _has_ended(self, slot: ProcessSlot, child: ChildProcess) -> bool:
        """Tell that a process has ended, and not by a signal that the launcher may be about to get as well."""
        if child.running:
            return False
        now = time.monotonic()
        slot.ended_at = now if slot.ended_at is None else slot.ended_at
        by_signal = ending_signal(child.exit_code) is not None and not self.supervisor.signals
        return not by_signal or now - slot.ended_at >= SIGNAL_SECONDS

    def _start(self, slot: ProcessSlot) -> None:
        slot.started_at = time.monotonic()
        try:
            slot.child = slot.start(slot.restart_count)
        except OSError as error:  # such as for lack of descriptors, just when others have died; those that run are healthy
            self._fail(slot, f"{slot.name} could not be started: {reason_of_start(error)}", again=True)

    def _reap(self, slot: ProcessSlot, child: ChildProcess) -> None:
        slot.child = slot.ended_at = None
        self.supervisor.reap(child)
        slot.exit_code, slot.joined = child.exit_code, slot.joined or child.joined
        if child.exit_code is not None and child.exit_code > 0:
            slot.left_on = ending_signal(child.exit_code)
        if child.exit_code == EXIT_DONE or slot.left_on is not None:
            slot.done = True
            if slot.left_on is not None and not slot.essential:
                self.report(f"{slot.name} left the run on {slot.left_on.name}")
            return
        slot.death = child.process.pid, child.outcome()
        advice = f"; {MEMORY}" if child.oom_cause else ""
        self._fail(slot, f"{child.exit_reason()}{advice}", again=slot.should_restart(child))

    def _explain(self, ended: Sequence[ChildProcess]) -> None:
        """Name those that were killed for lack of memory."""
        self.oom_kills.look()
        killed = [child for child in ended if child.killed_by_others]
        cause = self.oom_kills.cause(len(killed)) if killed else ""
        for child in killed:
            child.oom_cause = cause

    def _fail(self, slot: ProcessSlot, reason: str, *, again: bool) -> None:
        """Note why a process has ended, or has not begun; fill its slot again after a pause, or give it up."""
        slot.exit_reason = reason
        restarts = slot.restart_count
        exhausted = restarts >= self.max_restarts
        if exhausted or not again:
            slot.given_up = True
            slot.exit_reason += f"; restarted {restarts} times (runtime.max_restarts)" if exhausted and restarts else ""
            if not slot.essential:
                self.report(f"{slot.exit_reason}; the run continues without it")
        else:
            slot.failures = 0 if time.monotonic() - slot.started_at >= BACKOFF_RESET_SECONDS else slot.failures + 1
            pause = min(MAX_BACKOFF_SECONDS, self.backoff_seconds * 2 ** max(0, slot.failures - 1))
            slot.restart_at = time.monotonic() + pause
            self.report(f"{slot.exit_reason}; restarting it in {pause:g} s (restart {restarts + 1} of {self.max_restarts})")
