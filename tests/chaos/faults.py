"""The faults: each function injects one, and waits until its effect has been seen.

All raise `ChaosError` if the effect does not come.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from tests.chaos.injector import LEFT, SHORT, SOME_GRADIENTS, ExpectedEviction, Fault, FaultInjector
from tests.chaos.processes import pid_is_running
from tests.chaos.run import ChaosError

OWN_FAULTS = ("drop_reply@0:5", "delay@1:5:1.5", "corrupt@2:5:2", "drop_reply@2:10")
"""Faults that the processes inject into themselves (``runtime.faults``), early: workers differ in speed."""

# ---------------------------------------------------------------------------------------------------------------- workers


def kill_worker(injector: FaultInjector, fault: Fault) -> None:
    """SIGKILL of a worker: it is evicted, and its replacement works."""
    ((worker, pid),) = injector.kill_workers(fault, 1)
    since = time.monotonic()
    replacement = f"gradients of the replacement of worker {worker} (pid {pid})"
    injector.run.wait(lambda: injector.run.applied_by(worker, since), replacement)
    fault.outcome = "evicted and replaced"


def kill_two_workers(injector: FaultInjector, fault: Fault) -> None:
    """SIGKILL of two workers at once: both are evicted."""
    injector.kill_workers(fault, 2)


def kill_starting_worker(injector: FaultInjector, fault: Fault) -> None:
    """SIGKILL of a worker, and of its replacement before this one has joined: another one follows."""
    ((worker, _),) = injector.kill_workers(fault, 1)
    pid = injector.run.wait(lambda: injector.run.starting(worker), f"the start of a replacement of worker {worker}")
    os.kill(pid, signal.SIGKILL)
    fault.target = f"worker {worker} (pid {pid}), starting"
    injector.expect_exit(f"worker {worker}", pid, "was killed by SIGKILL")
    fault.outcome = "replaced again"


def stop_worker(injector: FaultInjector, fault: Fault) -> None:
    """SIGSTOP of a worker, for good: after the time-out it is evicted, and the launcher kills it."""
    ((worker, pid),) = injector.victims(1)
    fault.target = f"worker {worker} (pid {pid})"
    injector.hit(worker, pid, signal.SIGSTOP)
    injector.expect_eviction(worker, pid)
    injector.expect_exit(f"worker {worker}", pid, "was killed after")
    fault.outcome = "evicted, and killed by the launcher"


def pause_worker(injector: FaultInjector, fault: Fault) -> None:
    """SIGSTOP of a worker for a part of the time-out, then SIGCONT: it is not evicted."""
    ((worker, pid),) = injector.victims(1)
    fault.target = f"worker {worker} (pid {pid})"
    injector.pause(pid)
    injector.expect_work(worker, pid, time.monotonic())
    fault.outcome = "not evicted"


# ----------------------------------------------------------------------------------------------------------------- server


def kill_server(injector: FaultInjector, fault: Fault) -> None:
    """SIGKILL of the server: its next incarnation resumes."""
    pid = injector.run.server()
    fault.target = f"server (pid {pid})"
    injector.server_kills.append((time.monotonic(), injector.run.trace.incarnation))
    os.kill(pid, signal.SIGKILL)
    injector.expect_next_incarnation(fault, pid, "was killed by SIGKILL")


def kill_server_and_worker(injector: FaultInjector, fault: Fault) -> None:
    """SIGKILL of a worker and of the server at once: both are restarted."""
    ((worker, victim),) = injector.victims(1)
    pid, before = injector.run.server(), injector.run.trace.incarnation
    fault.target = f"worker {worker} (pid {victim}), server (pid {pid})"
    for each in (victim, pid):
        os.kill(each, signal.SIGKILL)
    injector.expect_next_incarnation(fault, pid, "was killed by SIGKILL")
    injector.expect_exit(f"worker {worker}", victim, "was killed by SIGKILL")
    if injector.was_evicted(victim):  # by the server, just before it died
        injector.evictions.append(ExpectedEviction(worker, victim, before, time.monotonic(), killed=False))


def stop_server(injector: FaultInjector, fault: Fault) -> None:
    """SIGSTOP of the server, for good: the launcher kills it after the time-out, and its next incarnation resumes."""
    pid = injector.run.server()
    fault.target = f"server (pid {pid})"
    os.kill(pid, signal.SIGSTOP)
    injector.expect_next_incarnation(fault, pid, "was killed after")


def pause_server(injector: FaultInjector, fault: Fault) -> None:
    """SIGSTOP of the server for a part of the time-out, then SIGCONT: it is not replaced."""
    pid, incarnation = injector.run.server(), injector.run.trace.incarnation
    fault.target = f"server (pid {pid})"
    injector.pause(pid)
    since = time.monotonic()
    injector.run.wait(
        lambda: len(injector.run.trace.applied_after(since)) >= SOME_GRADIENTS, "updates by the server that was paused"
    )
    if not pid_is_running(pid) or injector.run.trace.incarnation != incarnation:
        raise ChaosError(f"the server was replaced after {injector.timeout_seconds * SHORT:g} s")
    fault.outcome = "not replaced"


# -------------------------------------------------------------------------------------------------------- elastic workers


def elastic_worker_leaves(injector: FaultInjector, fault: Fault) -> None:
    """An elastic worker joins, works, and leaves by SIGTERM."""
    launched, _, pid = injector.add_elastic_worker(fault)
    launched.process.send_signal(signal.SIGTERM)
    injector.run.wait(lambda: launched.process.poll() is not None, f"the exit of {fault.target}")
    injector.run.wait(lambda: launched.search_log(LEFT), f"the last line of {fault.target}")
    if launched.process.returncode != 0 or injector.was_evicted(pid):
        raise ChaosError(f"it did not leave cleanly: exit status {launched.process.returncode}, {launched.log[-2:]}")
    fault.outcome = "left cleanly"


def elastic_worker_killed(injector: FaultInjector, fault: Fault) -> None:
    """An elastic worker joins, works, and its launcher is killed by SIGKILL: the worker exits too and is evicted."""
    launched, worker, pid = injector.add_elastic_worker(fault)
    injector.must_be_evicted(worker, pid, killed=False)
    launched.killed = True
    launched.process.kill()
    injector.expect_eviction(worker, pid)
    injector.run.wait(lambda: not pid_is_running(pid), "the exit of the worker whose launcher was killed")
    fault.outcome = "evicted, no process left"


def joined_worker_killed(injector: FaultInjector, fault: Fault) -> None:
    """SIGKILL of a worker that has joined, before it opens its data path: it is evicted."""
    _kill_at_stage(injector, fault, "joined")


def opening_worker_killed(injector: FaultInjector, fault: Fault) -> None:
    """SIGKILL of a worker when the server has made its half of the data path, and waits for the other one: it is evicted."""
    _kill_at_stage(injector, fault, "opening")


def connected_worker_killed(injector: FaultInjector, fault: Fault) -> None:
    """SIGKILL of a worker whose data path is open, before it asks for a ticket: it is evicted."""
    _kill_at_stage(injector, fault, "connected")


def sending_worker_killed(injector: FaultInjector, fault: Fault) -> None:
    """SIGKILL of a worker while a push or its reply is on the way: it is evicted."""
    _kill_at_stage(injector, fault, "sending")


def _kill_at_stage(injector: FaultInjector, fault: Fault, stage: str) -> None:
    _, pid = injector.add_worker_that_stops(fault, stage, signal.SIGKILL)
    injector.expect_eviction(-1, pid)
    fault.outcome = "evicted"


def sending_worker_stopped(injector: FaultInjector, fault: Fault) -> None:
    """SIGSTOP of a worker while a push or its reply is on the way; it is evicted, continues afterwards, and rejoins."""
    launched, pid = injector.add_worker_that_stops(fault, "sending", signal.SIGSTOP)
    injector.expect_eviction(-1, pid)
    launched.process.send_signal(signal.SIGCONT)
    injector.expect_rejoin(fault, launched, pid)
    fault.outcome = "evicted, and rejoined"


def kill_server_that_opens(injector: FaultInjector, fault: Fault) -> None:
    """SIGKILL of the server while it waits for a worker's half of a data path: the worker joins its next incarnation."""
    launched, worker = injector.add_worker_that_stops(fault, "opening", signal.SIGSTOP)
    injector.evictions.pop()  # the server does not live to see it
    pid = injector.run.server()
    fault.target += f", server (pid {pid})"
    os.kill(pid, signal.SIGKILL)
    injector.expect_next_incarnation(fault, pid, "was killed by SIGKILL")
    launched.process.send_signal(signal.SIGCONT)
    injector.expect_rejoin(fault, launched, worker)


# ---------------------------------------------------------------------------------------------------------------- network


def network_loss(injector: FaultInjector, fault: Fault) -> None:
    """No packet arrives for longer than the time-out: the remote worker is evicted, and rejoins by itself."""
    network, worker, pid = injector.remote_worker(fault)
    injector.must_be_evicted(worker, pid, killed=False)
    network.lose()
    try:
        injector.expect_eviction(worker, pid)
    finally:
        network.restore()
    since = time.monotonic()
    injector.run.wait(lambda: injector.is_at_work(pid, since), f"the rejoining of the remote worker (pid {pid})")
    fault.outcome = "evicted, and rejoined"


def network_blip(injector: FaultInjector, fault: Fault) -> None:
    """No packet arrives for a part of the time-out: the remote worker is not evicted."""
    network, worker, pid = injector.remote_worker(fault)
    network.lose()
    try:
        injector.run.poll_for(injector.timeout_seconds * SHORT)
    finally:
        network.restore()
    injector.expect_work(worker, pid, time.monotonic())
    fault.outcome = "not evicted"


KINDS: dict[str, Callable[[FaultInjector, Fault], None]] = {
    fault.__name__: fault
    for fault in (
        *(kill_worker, kill_two_workers, kill_starting_worker, stop_worker, pause_worker),
        *(kill_server, kill_server_and_worker, stop_server, pause_server),
        *(elastic_worker_leaves, elastic_worker_killed, network_loss, network_blip),
        *(joined_worker_killed, opening_worker_killed, connected_worker_killed, sending_worker_killed),
        *(sending_worker_stopped, kill_server_that_opens),
    )
}
"""The faults by name."""
NETWORK_FAULTS = ("network_loss", "network_blip")


def inject(injector: FaultInjector, kind: str, seconds: float) -> Fault:
    """Inject one fault.

    Args:
        injector: Into its run.
        kind: A key of `KINDS`.
        seconds: Since the run began.

    Raises:
        ChaosError: it did not have its effect.
    """
    fault = Fault(kind, injector.run.trace.iteration, seconds)
    injector.faults.append(fault)
    try:
        KINDS[kind](injector, fault)
    except ChaosError as error:
        fault.outcome = str(error)
        raise ChaosError(f"fault {len(injector.faults)}, {kind} of {fault.target or 'nothing yet'}: {error}") from None
    fault.fired = True
    return fault
