"""The monitor: who dies is replaced, so often and after such a pause; tiny real children, and time that the test tells."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Generator

import pytest

from ormo_rpc.runtimes.distributed.launcher import process_monitor as module
from ormo_rpc.runtimes.distributed.launcher.process_monitor import ProcessMonitor, ProcessSlot, killed, killed_or_failed
from ormo_rpc.runtimes.distributed.launcher.supervisor import DONE, EXIT_NO_RESTART, Child, Supervisor
from tests.support.processes import wait_until


class Clock:
    """Stands in for the module `time` of the monitor."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        """The time that was set."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def monitor(clock: Clock) -> Generator[ProcessMonitor]:  # noqa: ARG001 - it has to be there before
    told: list[str] = []
    with Supervisor(told.append) as supervisor:
        yield ProcessMonitor(supervisor, max_restarts=2, backoff_seconds=4.0, tell=told.append)


class Start:
    """Starts children that end by these statuses, one after the other; a negative one is a signal. Counts them."""

    def __init__(self, monitor: ProcessMonitor, *statuses: int) -> None:
        self.monitor = monitor
        self.statuses = statuses
        self.lives: list[int] = []

    def __call__(self, life: int) -> Child:
        """Start the next one."""
        status = self.statuses[len(self.lives)]
        self.lives.append(life)
        end = f"os._exit({status})" if status >= 0 else f"os.kill(os.getpid(), {-status})"
        return self.monitor.supervisor.start("it", [sys.executable, "-c", f"import os; {end}"], env=dict(os.environ), log=None)


def tended_until_buried(monitor: ProcessMonitor, slot: ProcessSlot) -> None:
    """Let the monitor look until the present child has ended and is taken notice of."""

    def buried() -> bool:
        monitor.monitor()
        return slot.child is None

    wait_until(buried, "the end of the child")


def test_who_has_done_its_work_is_not_replaced(monitor: ProcessMonitor) -> None:
    start = Start(monitor, DONE)
    slot = monitor.add("it", start)
    tended_until_buried(monitor, slot)
    monitor.monitor()
    assert (slot.done, slot.given_up, start.lives) == (True, False, [0])
    assert monitor.supervisor.children == []


def test_restarts_are_counted_and_the_pauses_double(monitor: ProcessMonitor, clock: Clock) -> None:
    start = Start(monitor, 1, -signal.SIGKILL, 3)
    slot = monitor.add("it", start)
    tended_until_buried(monitor, slot)
    assert slot.due == 104.0  # 4 s after the first death
    clock.now = 103.9
    monitor.monitor()
    assert start.lives == [0]
    clock.now = 104.0
    monitor.monitor()
    assert start.lives == [0, 1]
    tended_until_buried(monitor, slot)
    assert slot.due == 112.0  # 8 s after the second
    clock.now = 112.0
    monitor.monitor()
    tended_until_buried(monitor, slot)
    assert (slot.given_up, slot.over, start.lives) == (True, True, [0, 1, 2])
    assert re.fullmatch(r"it \(pid \d+\) exited with status 3; restarted 2 times \(runtime\.max_restarts\)", slot.exit_reason)


def test_the_pause_has_an_upper_end(monitor: ProcessMonitor, clock: Clock) -> None:
    monitor.max_restarts = 100
    slot = monitor.add("it", Start(monitor, *[1] * 7))
    pauses: list[float] = []
    for _ in range(6):
        tended_until_buried(monitor, slot)
        pauses.append(slot.due - clock.now)
        clock.now = slot.due
        monitor.monitor()
    assert pauses == [4, 8, 16, 30, 30, 30]


def test_after_a_long_life_the_pause_is_the_first_one_again(monitor: ProcessMonitor, clock: Clock) -> None:
    monitor.max_restarts = 100
    slot = monitor.add("it", Start(monitor, *[1] * 7))
    for _ in range(3):
        tended_until_buried(monitor, slot)
        clock.now = slot.due
        monitor.monitor()
    clock.now += module.LONG_LIFE_SECONDS
    tended_until_buried(monitor, slot)
    assert slot.due - clock.now == 4.0


@pytest.mark.parametrize(
    ("status", "restartable", "again"),
    [
        (1, killed_or_failed, True),
        (EXIT_NO_RESTART, killed_or_failed, False),
        (1, killed, False),
        (-signal.SIGSEGV, killed, True),
    ],
)
def test_some_ends_are_final(monitor: ProcessMonitor, status: int, restartable: object, again: bool) -> None:
    slot = monitor.add("it", Start(monitor, status), restartable=restartable)  # pyright: ignore[reportArgumentType] # one of two
    tended_until_buried(monitor, slot)
    assert slot.given_up == (not again)
    assert (slot.due > 0) == again
