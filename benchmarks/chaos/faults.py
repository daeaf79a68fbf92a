"""The faults: each method of `Chaos` injects one, and waits until what it had to lead to has been seen."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

from benchmarks.chaos.lineage import Death
from benchmarks.chaos.network import Network, ServerArgs
from benchmarks.chaos.watch import Failed, Launched, Run, is_alive, progress

WORDS = ("drop_reply@0:20", "delay@1:20:1.5", "corrupt@2:20:2", "drop_reply@2:40")
"""Faults that the processes inject into themselves, by ``runtime.faults``."""
SHORT = 0.3
"""A short fault lasts for this part of the time-out."""
WORK = 5
"""So many gradients show that somebody is at work."""


@dataclass(frozen=True)
class Loss:
    """A member that a fault has taken.

    Attributes:
        worker: Its number.
        pid: Its process number.
        life: The life of the server in which it was lost.
        at: When it was hit, on our monotonic clock.
        killed: By SIGKILL alone, so that the times that follow can be compared.
    """

    worker: int
    pid: int
    life: int
    at: float
    killed: bool


@dataclass
class Fault:
    """What has become of a fault.

    Attributes:
        kind: Which one.
        at_iteration: How many gradients had been applied.
        seconds: Since the run began.
        target: Who was hit.
        fired: It was seen to have had its effect.
        outcome: In words.
    """

    kind: str
    at_iteration: int
    seconds: float
    target: str = ""
    fired: bool = False
    outcome: str = ""


@dataclass
class Chaos:
    """Injects faults into a run and notes what comes of them.

    Attributes:
        run: The run.
        chance: Of the victims.
        timeout_seconds: ``runtime.worker_timeout_seconds`` of the run.
        network: Where there is one, with a guest on its other side.
        remote: That guest.
        faults: What was injected.
        losses: Members that had to be lost.
        deaths: Of the server.
        killed_at: When the server was killed by SIGKILL, and in which life.
    """

    run: Run
    chance: random.Random
    timeout_seconds: float
    network: Network | None = None
    remote: Launched | None = None
    faults: list[Fault] = field(default_factory=list[Fault])
    losses: list[Loss] = field(default_factory=list[Loss])
    deaths: list[Death] = field(default_factory=list[Death])
    killed_at: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])

    def inject(self, kind: str, seconds: float) -> Fault:
        """Inject one fault.

        Args:
            kind: A key of `KINDS`.
            seconds: Since the run began.

        Raises:
            Failed: it did not have the effect that it must have.
        """
        fault = Fault(kind, self.run.trace.iteration, seconds)
        self.faults.append(fault)
        try:
            KINDS[kind](self, fault)
        except Failed as failure:
            fault.outcome = str(failure)
            raise Failed(f"fault {len(self.faults)}, {kind} at {fault.target or 'nobody yet'}: {failure}") from None
        fault.fired = True
        return fault

    # ----------------------------------------------------------------------------------------------------------- workers

    def kill_worker(self, fault: Fault) -> None:
        """SIGKILL of a worker: it is lost, and its replacement works."""
        ((worker, pid),) = self._kill_workers(fault, 1)
        since = time.monotonic()
        self.run.wait(
            lambda: self.run.applied_by(worker, since), f"gradients of the replacement of worker {worker} (pid {pid})"
        )
        fault.outcome = "lost and replaced"

    def kill_two_workers(self, fault: Fault) -> None:
        """SIGKILL of two workers at once: both are lost."""
        self._kill_workers(fault, 2)

    def kill_starting_worker(self, fault: Fault) -> None:
        """SIGKILL of a worker, and of its replacement before this one is let in: another one follows."""
        ((worker, _),) = self._kill_workers(fault, 1)
        pid = self.run.wait(lambda: self.run.starting(worker), f"a replacement of worker {worker} starts")
        os.kill(pid, signal.SIGKILL)
        fault.target = f"worker {worker} (pid {pid}), starting"
        self._expect_obituary(f"worker {worker}", pid, "was killed by SIGKILL")
        fault.outcome = "replaced again"

    def stop_worker(self, fault: Fault) -> None:
        """SIGSTOP of a worker, for good: after the time-out it is lost, and its supervisor kills it."""
        worker, pid = self._victims(1)[0]
        fault.target = f"worker {worker} (pid {pid})"
        self._hit(worker, pid, signal.SIGSTOP)
        self._expect_loss(worker, pid)
        self._expect_obituary(f"worker {worker}", pid, "was silent for")
        fault.outcome = "lost, and killed by its supervisor"

    def pause_worker(self, fault: Fault) -> None:
        """SIGSTOP of a worker for a part of the time-out, then SIGCONT: nothing happens."""
        worker, pid = self._victims(1)[0]
        fault.target = f"worker {worker} (pid {pid})"
        os.kill(pid, signal.SIGSTOP)
        self.run.let_pass(self.timeout_seconds * SHORT)
        os.kill(pid, signal.SIGCONT)
        self._expect_work(worker, pid, time.monotonic())
        fault.outcome = "not lost"

    # ------------------------------------------------------------------------------------------------------------ server

    def kill_server(self, fault: Fault) -> None:
        """SIGKILL of the server: its next life goes on."""
        pid = self.run.server()
        fault.target = f"server (pid {pid})"
        self.killed_at.append((time.monotonic(), self.run.trace.life))
        os.kill(pid, signal.SIGKILL)
        self._expect_next_life(fault, pid, "was killed by SIGKILL")

    def kill_server_and_worker(self, fault: Fault) -> None:
        """SIGKILL of a worker and of the server at once: both are started again."""
        worker, victim = self._victims(1)[0]
        pid = self.run.server()
        fault.target = f"worker {worker} (pid {victim}), server (pid {pid})"
        for each in (victim, pid):
            os.kill(each, signal.SIGKILL)
        self._expect_next_life(fault, pid, "was killed by SIGKILL")
        self._expect_obituary(f"worker {worker}", victim, "was killed by SIGKILL")
        # The server may have noticed before it died itself.
        if self.run.launcher.find(_lost(victim)):
            self.losses.append(Loss(worker, victim, self.run.trace.life - 1, time.monotonic(), killed=False))

    def stop_server(self, fault: Fault) -> None:
        """SIGSTOP of the server, for good: its supervisor kills it after the time-out, and its next life goes on."""
        pid = self.run.server()
        fault.target = f"server (pid {pid})"
        os.kill(pid, signal.SIGSTOP)
        self._expect_next_life(fault, pid, "was silent for")

    def pause_server(self, fault: Fault) -> None:
        """SIGSTOP of the server for a part of the time-out, then SIGCONT: nothing happens."""
        pid, life = self.run.server(), self.run.trace.life
        fault.target = f"server (pid {pid})"
        os.kill(pid, signal.SIGSTOP)
        self.run.let_pass(self.timeout_seconds * SHORT)
        os.kill(pid, signal.SIGCONT)
        since = time.monotonic()
        self.run.wait(
            lambda: len(self.run.trace.applied_after(since)) >= WORK, "updates by the server that was stopped for a moment"
        )
        if not is_alive(pid) or self.run.trace.life != life:
            raise Failed(f"the server was taken for dead after {self.timeout_seconds * SHORT:g} s")
        fault.outcome = "nobody was lost"

    # ------------------------------------------------------------------------------------------------------------ guests

    def guest_leaves(self, fault: Fault) -> None:
        """A guest joins, works, and leaves by SIGTERM."""
        guest, _, pid = self._new_guest(fault)
        guest.process.send_signal(signal.SIGTERM)
        self.run.wait(lambda: guest.process.poll() is not None, f"the guest {fault.target} leaves")
        left = self.run.wait(lambda: guest.find("the worker has left, as SIGTERM asked$") or [None], "its last word")
        if guest.process.returncode != 0 or left == [None] or self.run.launcher.find(_lost(pid)):
            raise Failed(f"it did not leave cleanly: exit status {guest.process.returncode}, {guest.said[-2:]}")
        fault.outcome = "left cleanly"

    def guest_killed(self, fault: Fault) -> None:
        """A guest joins, works, and its launcher is killed by SIGKILL: its worker dies with it and is lost."""
        guest, worker, pid = self._new_guest(fault)
        self._note(worker, pid, killed=False)
        guest.process.kill()
        self._expect_loss(worker, pid)
        self.run.wait(lambda: not is_alive(pid), "the death of the killed guest's worker")
        fault.outcome = "lost, nothing of it left"

    # ----------------------------------------------------------------------------------------------------------- network

    def network_loss(self, fault: Fault) -> None:
        """No packet arrives for longer than the time-out: the guest on the other side is lost, and comes back by itself."""
        network, (worker, pid) = self._remote(fault)
        self._note(worker, pid, killed=False)
        network.lose()
        try:
            self._expect_loss(worker, pid)
        finally:
            network.restore()
        since = time.monotonic()
        self.run.wait(lambda: self._works(pid, since), f"the guest (pid {pid}) is back")
        fault.outcome = "lost, and back"

    def network_blip(self, fault: Fault) -> None:
        """No packet arrives for a part of the time-out: nothing happens."""
        network, (worker, pid) = self._remote(fault)
        network.lose()
        try:
            self.run.let_pass(self.timeout_seconds * SHORT)
        finally:
            network.restore()
        self._expect_work(worker, pid, time.monotonic())
        fault.outcome = "not lost"

    # ----------------------------------------------------------------------------------------------------------- helpers

    def remote_at_work(self) -> None:
        """Have a guest on the other side of the network, and wait until it works."""
        assert self.network is not None
        self.remote = self.run.guest(self.network.outside)
        self._at_work(self.remote)

    def _victims(self, count: int) -> list[tuple[int, int]]:
        """So many of the workers that the run itself has started, of those that are let in now."""

        def members() -> list[tuple[int, int]]:
            own = [(worker, pid) for worker, pid in self.run.processes()["workers"].items() if self._is_own(pid)]
            return own if len(own) >= count else []

        return self.chance.sample(self.run.wait(members, f"{count} workers to hit"), count)

    def _is_own(self, pid: int) -> bool:
        return psutil.Process(pid) in self.run.launcher.family if is_alive(pid) else False

    def _kill_workers(self, fault: Fault, count: int) -> list[tuple[int, int]]:
        """Kill so many, and wait until they are lost."""
        victims = self._victims(count)
        fault.target = ", ".join(f"worker {worker} (pid {pid})" for worker, pid in victims)
        for worker, pid in victims:
            self._hit(worker, pid, signal.SIGKILL)
        for worker, pid in victims:
            self._expect_loss(worker, pid)
            self._expect_obituary(f"worker {worker}", pid, "was killed by SIGKILL")
        fault.outcome = "lost"
        return victims

    def _hit(self, worker: int, pid: int, number: signal.Signals) -> None:
        self._note(worker, pid, killed=number is signal.SIGKILL)
        os.kill(pid, number)

    def _note(self, worker: int, pid: int, *, killed: bool) -> None:
        self.losses.append(Loss(worker, pid, self.run.trace.life, time.monotonic(), killed))

    def _expect_loss(self, worker: int, pid: int) -> None:
        wanted = sum(loss.pid == pid for loss in self.losses)
        lost = lambda: len(self.run.launcher.find(_lost(pid))) >= wanted  # noqa: E731 - one line
        self.run.wait(lost, f"the server tells that worker {worker} (pid {pid}) is lost")

    def _expect_obituary(self, name: str, pid: int, how: str) -> None:
        pattern = rf"^launch\.py: {name} \(pid {pid}\) {how}"
        self.run.wait(lambda: self.run.launcher.find(pattern), f"the launcher tells that {name} (pid {pid}) {how}")

    def _expect_work(self, worker: int, pid: int, since: float) -> None:
        """It works on after that moment, without having been lost."""
        wanted = len(self.run.launcher.find(_lost(pid)))
        self.run.wait(
            lambda: len(self.run.applied_by(worker, since)) >= WORK or len(self.run.launcher.find(_lost(pid))) > wanted,
            f"gradients of worker {worker} (pid {pid}), which was to be left alone",
        )
        if len(self.run.launcher.find(_lost(pid))) > wanted or not is_alive(pid):
            raise Failed(f"worker {worker} (pid {pid}) was given up after {self.timeout_seconds * SHORT:g} s")

    def _expect_next_life(self, fault: Fault, pid: int, how: str) -> None:
        life = self.run.trace.life
        self.run.wait(lambda: not is_alive(pid), f"the death of the server (pid {pid})")
        applied = progress(self.run.run_dir)  # the next life needs far longer to start than we to read this
        self._expect_obituary("server", pid, how)
        self.run.wait(lambda: self.run.trace.life > life, "the next life of the server")
        (resumed,) = {
            seen.data["iteration"] for seen in self.run.trace.seen if seen.life == life + 1 and seen.data["event"] == "resume"
        }
        self.deaths.append(Death(applied, resumed))
        since = time.monotonic()
        self.run.wait(lambda: len(self.run.trace.applied_after(since)) >= WORK, "updates in the next life of the server")
        fault.outcome = f"{applied} applied, goes on from {resumed}"

    def _works(self, pid: int, since: float) -> bool:
        """Whether a process is a member under any number, and has worked after that moment."""
        numbers = [worker for worker, each in self.run.processes()["workers"].items() if each == pid]
        return bool(numbers) and len(self.run.applied_by(numbers[0], since)) >= WORK

    def _new_guest(self, fault: Fault) -> tuple[Launched, int, int]:
        guest = self.run.guest(self.network.inside if self.network else ServerArgs())
        worker, pid = self._at_work(guest)
        fault.target = f"worker {worker} (pid {pid}), a guest"
        return guest, worker, pid

    def _at_work(self, guest: Launched) -> tuple[int, int]:
        worker, pid = self.run.wait(lambda: self.run.worker_of(guest), "a guest is let in")
        since = time.monotonic()
        self.run.wait(lambda: self._works(pid, since), f"gradients of the guest worker {worker} (pid {pid})")
        return worker, pid

    def _remote(self, fault: Fault) -> tuple[Network, tuple[int, int]]:
        assert self.network is not None
        assert self.remote is not None
        guest, since = self.remote, time.monotonic()
        self.run.wait(
            lambda: (here := self.run.worker_of(guest)) and self._works(here[1], since), "the guest beyond the network works"
        )
        here = self.run.worker_of(guest)
        assert here is not None
        fault.target = f"worker {here[0]} (pid {here[1]}), beyond the network"
        return self.network, here


def _lost(pid: int) -> str:
    """The server's warning; a process that comes back may have another number."""
    return rf"^launch\.py: server: worker \d+ \(pid {pid} on \S+\) is lost: "


KINDS: dict[str, Callable[[Chaos, Fault], None]] = {
    "kill_worker": Chaos.kill_worker,
    "kill_server": Chaos.kill_server,
    "network_loss": Chaos.network_loss,
    "pause_worker": Chaos.pause_worker,
    "stop_worker": Chaos.stop_worker,
    "kill_two_workers": Chaos.kill_two_workers,
    "guest_leaves": Chaos.guest_leaves,
    "kill_server_and_worker": Chaos.kill_server_and_worker,
    "network_blip": Chaos.network_blip,
    "kill_starting_worker": Chaos.kill_starting_worker,
    "guest_killed": Chaos.guest_killed,
    "stop_server": Chaos.stop_server,
    "pause_server": Chaos.pause_server,
}
"""The faults by name; the first ones are the ones that a short list has."""
OF_THE_NETWORK = ("network_loss", "network_blip")
