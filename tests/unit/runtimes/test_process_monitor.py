"""The process monitor: which ends of a process lead to a restart, how often, and after which pause; the clock is the test's."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
from typing_extensions import override

from ormo_rpc.runtimes.distributed.launcher import process_monitor as module
from ormo_rpc.runtimes.distributed.launcher.child import EXIT_DONE, EXIT_NO_RESTART
from ormo_rpc.runtimes.distributed.launcher.process_monitor import ProcessMonitor, ProcessSlot, if_killed, unless_banned
from ormo_rpc.runtimes.distributed.launcher.supervisor import ChildProcess, Supervisor
from ormo_rpc.runtimes.distributed.oom_kills import OomKills
from ormo_rpc.runtimes.distributed.shortages import MEMORY
from tests.support.processes import wait_until


class Clock:
    """In place of the module `time` of the monitor."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        """Return the time that was set."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def reported() -> list[str]:
    """The messages for people."""
    return []


@pytest.fixture
def monitor(clock: Clock, reported: list[str]) -> Generator[ProcessMonitor]:  # noqa: ARG001 - to be set up first
    with Supervisor(reported.append) as supervisor:
        yield ProcessMonitor(supervisor, max_restarts=2, backoff_seconds=4.0, report=reported.append)


class Start:
    """Starts processes that end with these statuses, in order; a negative one is a signal. Notes the restart counts.

    Where an `OSError` stands in place of a status, the process cannot be started.
    """

    def __init__(self, monitor: ProcessMonitor, *statuses: int | OSError) -> None:
        self.monitor = monitor
        self.statuses = statuses
        self.restart_counts: list[int] = []

    def __call__(self, restart_count: int) -> ChildProcess:
        """Start the next one."""
        status = self.statuses[len(self.restart_counts)]
        self.restart_counts.append(restart_count)
        if isinstance(status, OSError):
            raise status
        kill = f"signal.pthread_sigmask(signal.SIG_UNBLOCK, [{-status}]); os.kill(os.getpid(), {-status})"
        script = f"import os, signal; {kill if status < 0 else f'os._exit({status})'}"
        return self.monitor.supervisor.start("it", [sys.executable, "-c", script], env=dict(os.environ), log=None)


def poll_until_reaped(monitor: ProcessMonitor, slot: ProcessSlot) -> None:
    """Let the monitor poll until it has reaped the present process of the slot."""

    def reaped() -> bool:
        monitor.poll()
        return slot.child is None

    wait_until(reaped, "the end of the process")


def test_a_process_whose_work_is_done_is_not_restarted(monitor: ProcessMonitor) -> None:
    start = Start(monitor, EXIT_DONE)
    slot = monitor.add("it", start)
    poll_until_reaped(monitor, slot)
    monitor.poll()
    assert (slot.done, slot.given_up, start.restart_counts) == (True, False, [0])
    assert monitor.supervisor.children == []


def test_restarts_are_counted_and_the_pauses_double(monitor: ProcessMonitor, clock: Clock) -> None:
    start = Start(monitor, 1, -signal.SIGKILL, 3)
    slot = monitor.add("it", start)
    poll_until_reaped(monitor, slot)
    assert slot.restart_at == 104.0  # 4 s after the first end
    clock.now = 103.9
    monitor.poll()
    assert start.restart_counts == [0]
    clock.now = 104.0
    monitor.poll()
    assert start.restart_counts == [0, 1]
    poll_until_reaped(monitor, slot)
    assert slot.restart_at == 112.0  # 8 s after the second
    clock.now = 112.0
    monitor.poll()
    poll_until_reaped(monitor, slot)
    assert (slot.given_up, slot.finished, start.restart_counts) == (True, True, [0, 1, 2])
    assert re.fullmatch(r"it \(pid \d+\) exited with status 3; restarted 2 times \(runtime\.max_restarts\)", slot.exit_reason)


def test_the_pause_before_a_restart_has_a_maximum(monitor: ProcessMonitor, clock: Clock) -> None:
    monitor.max_restarts = 100
    slot = monitor.add("it", Start(monitor, *[1] * 7))
    pauses: list[float] = []
    for _ in range(6):
        poll_until_reaped(monitor, slot)
        pauses.append(slot.restart_at - clock.now)
        clock.now = slot.restart_at
        monitor.poll()
    assert pauses == [4, 8, 16, 30, 30, 30]


def test_the_pause_is_reset_after_a_process_has_run_for_long(monitor: ProcessMonitor, clock: Clock) -> None:
    monitor.max_restarts = 100
    slot = monitor.add("it", Start(monitor, *[1] * 7))
    for _ in range(3):
        poll_until_reaped(monitor, slot)
        clock.now = slot.restart_at
        monitor.poll()
    clock.now += module.BACKOFF_RESET_SECONDS
    poll_until_reaped(monitor, slot)
    assert slot.restart_at - clock.now == 4.0


@pytest.mark.parametrize(
    ("status", "should_restart", "again"),
    [
        (1, unless_banned, True),
        (EXIT_NO_RESTART, unless_banned, False),
        (1, if_killed, False),
        (-signal.SIGSEGV, if_killed, True),
    ],
)
def test_the_exit_status_decides_about_a_restart(
    monitor: ProcessMonitor, status: int, should_restart: object, again: bool
) -> None:
    slot = monitor.add("it", Start(monitor, status), should_restart=should_restart)  # pyright: ignore[reportArgumentType] # one of two
    poll_until_reaped(monitor, slot)
    assert slot.given_up == (not again)
    assert (slot.restart_at > 0) == again


def test_a_process_that_cannot_be_started_counts_as_a_restart_and_is_given_up_in_the_end(
    monitor: ProcessMonitor, clock: Clock, reported: list[str]
) -> None:
    """The first start as well as the later ones."""
    errors = [OSError(number, os.strerror(number)) for number in (errno.EMFILE, errno.EAGAIN, errno.ENOMEM)]
    start = Start(monitor, *errors)
    slot = monitor.add("worker 3", start)
    assert (slot.child, slot.finished, slot.restart_at) == (None, False, 104.0)
    clock.now = 103.9
    monitor.poll()
    assert start.restart_counts == [0]
    clock.now = 104.0
    monitor.poll()
    assert (slot.finished, slot.restart_at) == (False, 112.0)
    clock.now = 112.0
    monitor.poll()
    assert (slot.given_up, slot.done, start.restart_counts) == (True, False, [0, 1, 2])
    assert reported == [
        "worker 3 could not be started: Too many open files (no descriptor is left: raise ulimit -n); "
        "restarting it in 4 s (restart 1 of 2)",
        "worker 3 could not be started: Resource temporarily unavailable (no further process or thread is allowed: raise "
        "ulimit -u, or pids.max of the control group); restarting it in 8 s (restart 2 of 2)",
        f"worker 3 could not be started: Cannot allocate memory ({MEMORY}); "
        "restarted 2 times (runtime.max_restarts); the run continues without it",
    ]


def test_a_failed_start_does_not_disturb_the_others_and_a_later_one_may_work(monitor: ProcessMonitor, clock: Clock) -> None:
    unlucky = monitor.add("worker 0", Start(monitor, OSError(errno.EMFILE, "any"), EXIT_DONE), should_restart=if_killed)
    healthy = monitor.add("worker 1", Start(monitor, EXIT_DONE))
    poll_until_reaped(monitor, healthy)
    clock.now = unlucky.restart_at
    monitor.poll()
    poll_until_reaped(monitor, unlucky)
    assert (unlucky.done, unlucky.restart_count, healthy.done) == (True, 1, True)


class Kills(OomKills):
    """Tells a cause for as many deaths as there are in one poll, and notes their number."""

    def __init__(self) -> None:
        super().__init__(Path("/nowhere"), Path("/nowhere"))
        self.asked: list[int] = []

    @override
    def cause(self, killed: int) -> str:
        self.asked.append(killed)
        return "for a reason"


def test_processes_that_were_killed_for_memory_are_named_and_others_are_not(
    monitor: ProcessMonitor, reported: list[str]
) -> None:
    """SIGKILL by others is asked about, once for all that are found dead together; no other end, nor a kill of our own."""
    kills = monitor.oom_kills = Kills()
    killed = [monitor.add(f"worker {number}", Start(monitor, -signal.SIGKILL)) for number in range(2)]
    other = monitor.add("worker 2", Start(monitor, -signal.SIGALRM))
    silent = monitor.add("worker 3", Start(monitor, -signal.SIGKILL))
    assert silent.child is not None
    silent.child.start_timeout_seconds = -1.0
    os.kill(silent.child.process.pid, signal.SIGSTOP)  # it has not ended by itself
    silent.child.kill_if_silent()
    children = [slot.child for slot in monitor.slots]
    wait_until(lambda: not any(child is not None and child.running for child in children), "the end of all")
    monitor.poll()
    assert kills.asked == [2]
    named = rf"was killed by SIGKILL, for a reason; {MEMORY}; restarting it"
    assert [bool(re.search(named, line)) for line in reported] == [True, True, False, False]
    assert [slot.death and slot.death[1] for slot in (*killed, other)] == [
        *["was killed by SIGKILL, for a reason"] * 2,
        "was killed by SIGALRM",
    ]


@pytest.mark.parametrize(("status", "left"), [(-signal.SIGTERM, False), (128 + signal.SIGHUP, True)])
def test_a_process_that_a_signal_ended_is_judged_once_the_launcher_had_time_to_get_it_as_well(
    monitor: ProcessMonitor, clock: Clock, status: int, left: bool
) -> None:
    reported: list[str] = []
    monitor.report = reported.append
    slot = monitor.add("it", Start(monitor, status))
    child = slot.child
    assert child is not None
    wait_until(lambda: not child.running, "the end of the process")
    monitor.poll()
    clock.now += 0.9 * module.SIGNAL_SECONDS
    monitor.poll()
    assert (slot.child, slot.finished, reported) == (child, False, [])
    clock.now += 0.2 * module.SIGNAL_SECONDS
    monitor.poll()
    assert (slot.child, slot.done, slot.left_on) == (None, left, signal.SIGHUP if left else None)
    said = (
        "it left the run on SIGHUP" if left else rf"it \(pid {child.process.pid}\) was killed by SIGTERM; restarting it in .*"
    )
    assert re.fullmatch(said, reported[0])


def test_a_process_that_the_launchers_signal_ended_is_reaped_without_a_pause(monitor: ProcessMonitor) -> None:
    monitor.supervisor.signals.append(signal.SIGTERM)
    slot = monitor.add("it", Start(monitor, 128 + signal.SIGTERM))
    poll_until_reaped(monitor, slot)
    assert slot.left_on == signal.SIGTERM
