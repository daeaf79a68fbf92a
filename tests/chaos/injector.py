"""The run that faults are injected into: its victims, and the effects to wait for."""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import dataclass, field

import psutil

from tests.chaos.checks import ServerDeath
from tests.chaos.network import Namespace, Network
from tests.chaos.processes import pid_is_running
from tests.chaos.run import ChaosError, Launched, ObservedRun, applied_gradients

SHORT = 0.3
"""Length of a short fault, as a part of the time-out."""
SOME_GRADIENTS = 5
"""Gradients that prove a worker or a server to be at work."""


def eviction_warning(pid: str | int = r"(\d+)") -> str:
    """The pattern of the server's warning about an eviction; a process that rejoins may have another worker number."""
    return rf"^launch\.py: server: worker \d+ \(pid {pid} on \S+\) was evicted: "


OWN_FAULT = r"^launch\.py: worker \d+: fault ([^\s,]+)"
"""The pattern of a worker's line about a fault of ``runtime.faults``."""
LEFT = "the worker left the run on SIGTERM$"
"""The pattern of the last line of an elastic worker that leaves."""


@dataclass(frozen=True)
class ExpectedEviction:
    """A worker that a fault has taken, so that the server has to evict it.

    Attributes:
        worker: Its number; -1 where it has none yet.
        pid: Its process id.
        incarnation: Of the server that has to evict it.
        hit_at: When the fault was injected, on our monotonic clock.
        killed: By SIGKILL alone, so that its times can be compared with others'.
    """

    worker: int
    pid: int
    incarnation: int
    hit_at: float
    killed: bool


@dataclass
class Fault:
    """An injected fault.

    Attributes:
        kind: A key of `faults.KINDS`.
        at_iteration: Gradients applied before it.
        seconds: Since the run began.
        target: The processes that were hit.
        fired: Its effect was seen.
        outcome: The effect, in words.
    """

    kind: str
    at_iteration: int
    seconds: float
    target: str = ""
    fired: bool = False
    outcome: str = ""


@dataclass
class FaultInjector:
    """The run under test, and what the faults have done to it.

    Attributes:
        run: The run.
        rng: Draws the victims.
        timeout_seconds: ``runtime.worker_timeout_seconds`` of the run.
        network: A network that can be cut; None if there is none.
        remote: The elastic worker on its other side.
        faults: The faults injected so far.
        evictions: Workers that have to be evicted.
        deaths: Of the server.
        server_kills: When the server was killed by SIGKILL, and in which incarnation.
    """

    run: ObservedRun
    rng: random.Random
    timeout_seconds: float
    network: Network | None = None
    remote: Launched | None = None
    faults: list[Fault] = field(default_factory=list[Fault])
    evictions: list[ExpectedEviction] = field(default_factory=list[ExpectedEviction])
    deaths: list[ServerDeath] = field(default_factory=list[ServerDeath])
    server_kills: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])

    # ------------------------------------------------------------------------------------------------------------- victims

    def victims(self, count: int) -> list[tuple[int, int]]:
        """Draw workers that have joined, of those that the run itself has launched: number and process id of each."""

        def joined() -> list[tuple[int, int]]:
            own = [(worker, pid) for worker, pid in self.run.processes()["workers"].items() if self._is_own(pid)]
            return own if len(own) >= count else []

        return self.rng.sample(self.run.wait(joined, f"{count} workers to hit"), count)

    def kill_workers(self, fault: Fault, count: int) -> list[tuple[int, int]]:
        """Kill workers, and wait until they are evicted."""
        victims = self.victims(count)
        fault.target = ", ".join(f"worker {worker} (pid {pid})" for worker, pid in victims)
        for worker, pid in victims:
            self.hit(worker, pid, signal.SIGKILL)
        for worker, pid in victims:
            self.expect_eviction(worker, pid)
            self.expect_exit(f"worker {worker}", pid, "was killed by SIGKILL")
        fault.outcome = "evicted"
        return victims

    def hit(self, worker: int, pid: int, number: signal.Signals) -> None:
        """Send a signal to a worker that has to be evicted for it."""
        self.must_be_evicted(worker, pid, killed=number is signal.SIGKILL)
        os.kill(pid, number)

    def must_be_evicted(self, worker: int, pid: int, *, killed: bool) -> None:
        """Note a worker that is about to be hit."""
        self.evictions.append(ExpectedEviction(worker, pid, self.run.trace.incarnation, time.monotonic(), killed))

    def pause(self, pid: int) -> None:
        """Stop a process for a short time."""
        os.kill(pid, signal.SIGSTOP)
        self.run.poll_for(self.timeout_seconds * SHORT)
        os.kill(pid, signal.SIGCONT)

    # ----------------------------------------------------------------------------------------------------- elastic workers

    def add_remote_worker(self) -> None:
        """Launch an elastic worker on the other side of the network, and wait until it works."""
        assert self.network is not None
        self.remote = self.run.add_elastic_worker(self.network.outside, self.timeout_seconds)
        self._wait_until_at_work(self.remote)

    def add_elastic_worker(self, fault: Fault) -> tuple[Launched, int, int]:
        """Launch an elastic worker, and wait until it works: its launcher, number and process id."""
        launched = self.run.add_elastic_worker(self.network.inside if self.network else Namespace(), self.timeout_seconds)
        worker, pid = self._wait_until_at_work(launched)
        fault.target = f"elastic worker {worker} (pid {pid})"
        return launched, worker, pid

    def add_worker_that_stops(self, fault: Fault, stage: str, number: signal.Signals) -> tuple[Launched, int]:
        """Start an elastic worker that sends itself a signal at a stage, wait until it has; its process id.

        It has to be evicted for it.
        """
        namespace = self.network.inside if self.network else Namespace()
        launched = self.run.add_elastic_worker_with(namespace, stage, number)
        pid = launched.process.pid  # which the command of a network namespace hands on
        fault.target = f"elastic worker (pid {pid}), {stage}"
        launched.killed = number is signal.SIGKILL
        self.must_be_evicted(-1, pid, killed=False)
        status = psutil.STATUS_ZOMBIE if launched.killed else psutil.STATUS_STOPPED
        self.run.wait(lambda: launched.process.poll() is not None or _status(pid) == status, f"the signal of {fault.target}")
        if launched.process.poll() not in (None, -number):
            raise ChaosError(f"it ended before that: exit status {launched.process.poll()}, {launched.log[-2:]}")
        return launched, pid

    def expect_rejoin(self, fault: Fault, launched: Launched, pid: int) -> None:
        """Wait until an elastic worker without a launcher works (again), and let it leave."""
        since = time.monotonic()
        self.run.wait(lambda: self.is_at_work(pid, since), f"the rejoining of {fault.target}")
        launched.process.send_signal(signal.SIGTERM)
        self.run.wait(lambda: launched.process.poll() is not None, f"the exit of {fault.target}")

    def remote_worker(self, fault: Fault) -> tuple[Network, int, int]:
        """Wait until the elastic worker on the other side works: the network, its number and process id."""
        assert self.network is not None
        assert self.remote is not None
        remote, since = self.remote, time.monotonic()
        found = self.run.wait(
            lambda: (found := self.run.worker_of(remote)) and self.is_at_work(found[1], since) and found,
            "gradients of the remote worker",
        )
        fault.target = f"remote worker {found[0]} (pid {found[1]})"
        return self.network, *found

    def is_at_work(self, pid: int, since: float) -> bool:
        """Tell whether the process is a worker under any number, and has worked after that moment."""
        numbers = [worker for worker, each in self.run.processes()["workers"].items() if each == pid]
        return bool(numbers) and len(self.run.applied_by(numbers[0], since)) >= SOME_GRADIENTS

    # ------------------------------------------------------------------------------------------------------------- effects

    def was_evicted(self, pid: int) -> int:
        """Number of evictions of a process so far."""
        return len(self.run.launcher.search_log(eviction_warning(pid)))

    def expect_eviction(self, worker: int, pid: int) -> None:
        """Wait until the server reports the eviction."""
        count = sum(eviction.pid == pid for eviction in self.evictions)
        self.run.wait(lambda: self.was_evicted(pid) >= count, f"the eviction of worker {worker} (pid {pid})")

    def expect_exit(self, name: str, pid: int, reason: str) -> None:
        """Wait until the launcher reports the exit of a process, with that reason."""
        pattern = rf"^launch\.py: {name} \(pid {pid}\) {reason}"
        self.run.wait(lambda: self.run.launcher.search_log(pattern), f"the launcher's line: {name} (pid {pid}) {reason}")

    def expect_work(self, worker: int, pid: int, since: float) -> None:
        """Wait until a worker has worked after that moment.

        Raises:
            ChaosError: it was evicted.
        """
        before = self.was_evicted(pid)
        self.run.wait(
            lambda: len(self.run.applied_by(worker, since)) >= SOME_GRADIENTS or self.was_evicted(pid) > before,
            f"gradients of worker {worker} (pid {pid}), which no fault is to take",
        )
        if self.was_evicted(pid) > before or not pid_is_running(pid):
            raise ChaosError(f"worker {worker} (pid {pid}) was evicted after {self.timeout_seconds * SHORT:g} s")

    def expect_next_incarnation(self, fault: Fault, pid: int, reason: str) -> None:
        """Wait until the server has exited for that reason, and its next incarnation works."""
        before = self.run.trace.incarnation
        self.run.wait(lambda: not pid_is_running(pid), f"the exit of the server (pid {pid})")
        applied = applied_gradients(self.run.run_dir)  # read in far less time than the next incarnation takes to start
        self.expect_exit("server", pid, reason)
        self.run.wait(lambda: self.run.trace.incarnation > before, "the next incarnation of the server")
        now = self.run.trace.incarnation
        (resumed,) = {
            event.data["iteration"]
            for event in self.run.trace.events
            if event.incarnation == now and event.data["event"] == "resume"
        }
        self.deaths.append(ServerDeath(applied, resumed))
        since = time.monotonic()
        self.run.wait(
            lambda: len(self.run.trace.applied_after(since)) >= SOME_GRADIENTS, "updates by the server's next incarnation"
        )
        fault.outcome = f"{applied} applied, resumed from {resumed}"

    def _is_own(self, pid: int) -> bool:
        return psutil.Process(pid) in self.run.launcher.family if pid_is_running(pid) else False

    def _wait_until_at_work(self, launched: Launched) -> tuple[int, int]:
        worker, pid = self.run.wait(lambda: self.run.worker_of(launched), "the join of an elastic worker")
        since = time.monotonic()
        self.run.wait(lambda: self.is_at_work(pid, since), f"gradients of elastic worker {worker} (pid {pid})")
        return worker, pid


def _status(pid: int) -> str:
    """The state of a process; empty where it has ended."""
    try:
        return psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return ""
