"""The server's process: builds the parameter server, lets the workers in, and writes down what happens to the end."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ormo_rpc.compression.wire_options import Transport
from ormo_rpc.config.parsing import load_config
from ormo_rpc.config.schema import Config
from ormo_rpc.messages import Reply
from ormo_rpc.rendezvous.addresses import address_of
from ormo_rpc.rendezvous.listener import Listener
from ormo_rpc.rendezvous.memberships import Membership
from ormo_rpc.rendezvous.protocol import JoinResponse
from ormo_rpc.rendezvous.secret import Secret
from ormo_rpc.runtimes.distributed.server_process.service import Service
from ormo_rpc.runtimes.job import Job
from ormo_rpc.runtimes.session import Session
from ormo_rpc.server.parameter_server import ParameterServer
from ormo_rpc.transports.stream.server import StreamServer, shared_snapshots
from ormo_rpc.transports.torch_rpc.agent import SERVER, rpc_agent
from ormo_rpc.transports.torch_rpc.handlers import CALLED_BY_WORKERS, publish
from ormo_rpc.worker.faults import FaultInjector

PUMP_SECONDS = 0.1
"""How often events are written down."""
SWITCH_SECONDS = 0.001
"""How long the thread that writes the trace may hold up one that has a push to apply."""
_log = logging.getLogger(__name__)


class Stopwatch:
    """Seconds since `start`, 0 before.

    Attributes:
        before: Seconds of earlier lives, which count.
    """

    def __init__(self) -> None:
        self.before = 0.0
        self._since: float | None = None

    def start(self) -> None:
        """Begin to count."""
        self._since = time.monotonic()

    def __call__(self) -> float:
        """The seconds."""
        return self.before + (0.0 if self._since is None else time.monotonic() - self._since)


@dataclass(frozen=True, kw_only=True)
class ServerArgs:
    """What a server's process is told when it is started.

    Attributes:
        run_dir: The run directory, with ``config.yaml``.
        listener: The listening socket, which outlives this process.
        secret: Of the run.
        life: How often the server was started before.
        terminal: A file descriptor for the progress bar, where there is a terminal.
        tell: Called with what people should know.
    """

    run_dir: Path
    listener: socket.socket
    secret: Secret
    life: int
    terminal: int | None
    tell: Callable[[str], None]


class ServerProcess:
    """Everything in the server's process: the session of the run, and the service that the workers reach.

    The main thread runs `run`. Threads of the listener, which serve the streams, and of the RPC agent call `Session.observe` under
    the service's lock; evaluations and the writing of checkpoints have a thread each. What the main thread reads without that
    lock (whether the run has ended, how many are there) it looks at again a moment later.

    Args:
        job: The run.
        place: Where to serve.
    """

    def __init__(self, job: Job, place: ServerArgs) -> None:
        self.options = job.config.rpc
        self.place = place
        self.clock = Stopwatch()
        self.stop_asked = threading.Event()
        self.stop_message: dict[str, str] = {}
        self.abandoned = ""
        """Why our supervisor has no worker any more; empty while it has one."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="evaluation")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.session = Session(
            job, place.run_dir, self._pool, self._writer, self.clock, extra_metrics=self._lock_times, terminal=place.terminal
        )
        server = self.session.server
        self.segments = shared_snapshots(server.algorithm, job.config.wire.transport)
        server.reserve(1 if server.scheduler.BARRIER else server.num_workers)
        self._rolled_back_before = self.session.counters.rolled_back
        self.session.open(incarnation=place.life)
        self.clock.before = self.session.seconds_before
        self._injector = FaultInjector(self.options.faults, None, place.life, place.tell)
        self.service = Service(
            self.session.server,
            self._observe,
            self._begin,
            journal=self.session.journal,
            push_format=job.push_format(),
            max_not_finite=self.options.max_not_finite,
            defer_shutdown=True,
        )
        self.service.evictions = self.session.directory.read_evictions()
        self._evictions_written = len(self.service.evictions)
        self._present: dict[int, int] = {}
        self._paused = False
        self._alone_since = time.monotonic()
        self._kept_at = time.monotonic()
        """When a checkpoint was last asked for."""

    def run(self) -> dict[str, Any]:
        """Record until the run is over and the workers are gone; return the summary.

        Raises:
            RuntimeError: it cannot go on.
        """
        if self.place.life > 0:
            _log.warning(
                "the server resumes from iteration %d; %d later updates are rolled back",
                self.session.server.iteration,
                self.session.counters.rolled_back - self._rolled_back_before,
            )
        # A former life may have applied the last gradient and died before it could say so.
        if self.session.server.ended or not self._wait_for_start():
            return self._finish()
        limit = self.session.job.config.train.max_seconds
        while not self.session.server.ended:
            if self.stop_asked.wait(PUMP_SECONDS):
                break
            self._check_whole()
            self._look_after_workers()
            self._keep()
            if limit is not None and self.clock() >= limit:
                limit = None
                self.service.finish()
            self.session.flush()
            if self._nobody_comes():
                return self._give_up()
        return self._finish()

    def hear(self, message: dict[str, Any]) -> None:
        """Hear the supervisor; called in the thread that listens to it."""
        if "worker_ended" in message:
            for worker in range(
                message["worker_ended"], self.service.server.num_workers, self.session.job.config.num_processes
            ):
                self.service.stop_waiting_for(worker)
        elif "all_workers_ended" in message:
            self.abandoned = message["all_workers_ended"]
        else:
            self.stop_message = message["stop"]
            self.stop_asked.set()

    def _begin(self) -> None:
        """The first ticket is about to be handed out; called under the service's lock."""
        self.clock.start()
        self._present = {membership.worker: membership.pid for membership in self.service.memberships.by_worker.values()}

    def _observe(self, server: ParameterServer) -> None:
        self.session.observe(server)
        self._injector.applied(server.iteration)

    def _wait_for_start(self) -> bool:
        """Wait until the workers are there; return whether the run has begun.

        In a later life of the server those who are back in time begin, since others may never come back.
        """
        began = time.monotonic()
        wanted = self.session.server.num_workers
        while not self.service.started.wait(PUMP_SECONDS):
            if self.stop_asked.is_set():
                return False
            self._look_after_workers()
            self.session.flush()
            waited = time.monotonic() - began
            if self.place.life > 0 and waited > self.options.regroup_seconds:
                self.service.start()
            if waited > self.options.start_timeout_seconds or (self.abandoned and not self.service.memberships):
                here = sorted(membership.worker for membership in self.service.arrived)
                missing = [worker for worker in range(wanted) if worker not in here]
                raise TimeoutError(
                    self.abandoned
                    or f"worker {missing[0]} was not ready within runtime.start_timeout_seconds="
                    f"{self.options.start_timeout_seconds:g} ({len(here)} of {wanted} were); see its log"
                )
        return True

    def _look_after_workers(self) -> None:
        """Write down who is there, and evict who does not come back with its ticket."""
        if self.service.changed.is_set():
            self.service.changed.clear()
            with self.service.lock:
                if self.session.server.ended:
                    return  # all are leaving; who was there is of more interest
                self._present = {
                    membership.worker: membership.pid for membership in self.service.memberships.by_worker.values()
                }
            self._write_processes()
        self._write_evictions()
        self.service.evict_late(self.options.ticket_timeout_seconds)
        members, least = len(self.session.server.members), self.options.min_workers
        if self.service.started.is_set() and self._paused != (members < least):
            self._paused = members < least
            if self._paused:
                _log.warning("paused: %d workers, and runtime.min_workers=%d; waiting for more", members, least)
            else:
                _log.warning("resumed: %d workers", members)

    def _write_processes(self) -> None:
        """Write down who was there when somebody came or went the last time before the end."""
        self.session.directory.write_processes(os.getpid(), self._present, address_of(self.place.listener))

    def _write_evictions(self) -> None:
        """Write down who was lost since the last call, so that a later life knows, too."""
        new = self.service.evictions[self._evictions_written :]
        if new:
            self._evictions_written += len(new)
            self.session.directory.write_evictions(new)

    def _keep(self) -> None:
        """Have a checkpoint written when it is time for one."""
        every, now = self.session.job.config.checkpoint.every_seconds, time.monotonic()
        if every and now - self._kept_at >= every:
            self._kept_at = now
            with self.service.lock:
                self.session.copy_state()

    def _nobody_comes(self) -> bool:
        """Whether there is no worker, and none to be expected."""
        if self.service.memberships:
            self._alone_since = time.monotonic()
            return False
        return bool(self.abandoned) or time.monotonic() - self._alone_since > self.options.start_timeout_seconds

    def _give_up(self) -> dict[str, Any]:
        """Keep what there is, and end.

        Raises:
            RuntimeError: in any case.
        """
        reason = self.abandoned or f"no worker for runtime.start_timeout_seconds={self.options.start_timeout_seconds:g}"
        self.stop_message = {"status": "failed", "reason": f"no worker is left: {reason}"}
        self._finish()
        raise RuntimeError(f"no worker is left: {reason}")

    def _finish(self) -> dict[str, Any]:
        """Write the last checkpoint, let the workers go, and write the summary."""
        seconds, state = self.clock(), dict[str, Any]()

        def stop(server: ParameterServer) -> list[Reply]:
            state.update(server.state_dict())  # in one step with the stop: nothing is applied that is not in the checkpoint
            return server.stop()

        self.service.call(stop)
        self._check_whole()
        self._write_processes()  # a run may be over before anybody has looked
        self._write_evictions()
        self.session.write_checkpoint(state)
        self.service.release_shutdown()  # not before: should we die while we write, the workers are needed again
        if not self.stop_message:
            self._wait_for_workers()
        summary = self.session.close(
            state, wait=not self.stop_message, wall_seconds=seconds, evictions=self.service.evictions, **self.stop_message
        )
        for pool in (self._pool, self._writer):
            pool.shutdown(wait=False, cancel_futures=True)
        return summary

    def _check_whole(self) -> None:
        """Refuse to go on with, or to keep, a state to which a push may have been applied by half."""
        cause = self.service.broken
        if cause is not None:
            raise RuntimeError(f"a push could not be applied: {type(cause).__name__}: {cause}") from cause

    def _wait_for_workers(self) -> None:
        """Until all have said goodbye; one that hangs is left to its supervisor."""
        deadline = time.monotonic() + self.options.stop_timeout_seconds
        while self.service.memberships and time.monotonic() < deadline:
            self.session.flush()
            time.sleep(PUMP_SECONDS / 10)

    def _lock_times(self) -> dict[str, float]:
        return {"lock_wait_seconds": self.service.lock_wait_seconds, "lock_held_seconds": self.service.lock_held_seconds}


def serve(place: ServerArgs, on_ready: Callable[[ServerProcess], None]) -> None:
    """Be the server of a run from start to end.

    Args:
        place: Where to serve.
        on_ready: Called with the host as soon as it can be asked to stop.
    """
    text = (place.run_dir / "config.yaml").read_text()
    config = load_config(place.run_dir / "config.yaml")
    host = ServerProcess(Job(config), place)
    options = config.rpc
    sys.setswitchinterval(SWITCH_SECONDS)
    with _agent(config) as agent:
        if agent is not None:
            publish(host.service)
        on_ready(host)

        def response(membership: Membership) -> JoinResponse:
            return JoinResponse(
                worker=membership.worker,
                session_id=membership.session_id,
                config=text,
                agent=agent,
                heartbeat_seconds=options.heartbeat_seconds,
                timeout_seconds=options.worker_timeout_seconds,
            )

        streams = StreamServer(host.service, config.wire.transport, host.segments)
        with Listener(place.listener, place.secret, host.service, response, options.worker_timeout_seconds, streams.serve):
            host.run()


@contextlib.contextmanager
def _agent(config: Config) -> Generator[str | None]:
    """The server's agent of torch.distributed.rpc, whose address is the value; None where the wire does without."""
    if config.wire.transport is not Transport.uv:
        yield None
        return
    with rpc_agent(
        SERVER,
        0,
        server=None,
        timeout_seconds=config.rpc.rpc_timeout_seconds,
        threads=max(16, config.num_workers + 4),  # a handler never waits for another one, but for the lock
        functions=CALLED_BY_WORKERS,
    ) as address:
        yield address
