"""The server's process: builds the parameter server, serves it to the workers, and records the run to its end."""

from __future__ import annotations

import logging
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ormo_rpc.config.parsing import load_config
from ormo_rpc.control import torch_rpc
from ormo_rpc.kernels.pool import pooled
from ormo_rpc.loggers import end_service
from ormo_rpc.rendezvous.addresses import address_of
from ormo_rpc.rendezvous.interfaces import specific_address
from ormo_rpc.rendezvous.secret import Secret
from ormo_rpc.runtimes.collectives import COLLECTIVES, SharedValues
from ormo_rpc.runtimes.distributed.server_process.gpu_memory import GpuSide
from ormo_rpc.runtimes.distributed.server_process.requested_checkpoint import RequestedCheckpoint
from ormo_rpc.runtimes.distributed.server_process.service import Service
from ormo_rpc.runtimes.distributed.server_process.serving import Serving, served
from ormo_rpc.runtimes.distributed.server_process.shutdown import check_state, shut_down
from ormo_rpc.runtimes.distributed.server_process.timers import Interval, Stopwatch
from ormo_rpc.runtimes.distributed.server_process.watchdog import Watchdog
from ormo_rpc.runtimes.distributed.worker_devices import DEVICES, WorkerDevices
from ormo_rpc.runtimes.job import LoadedJob, job_of
from ormo_rpc.runtimes.job_like import LiveJob
from ormo_rpc.runtimes.session import Session
from ormo_rpc.runtimes.start_check import WAIT_SECONDS, StartCheck
from ormo_rpc.server.parameter_server import ParameterServer
from ormo_rpc.worker.faults import FaultInjector

FLUSH_SECONDS = 0.1
"""The interval at which events are written."""
SWITCH_SECONDS = 0.001
"""The longest time that the thread that writes the trace holds the interpreter's lock before one with a push gets it."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServerArgs:
    """The arguments of a server's process.

    Attributes:
        run_dir: The run directory, with ``config.yaml``.
        began: Time on the monotonic clock at which the run began, in the launcher.
        listening_socket: Of the rendezvous; it outlives this process.
        secret: Of the run.
        incarnation: The number of earlier server processes of this run directory.
        terminal_fd: A file descriptor for the progress bar, where there is a terminal.
        report: Called with messages for people.
        start: The way in which the launcher starts processes, with the reason for it.
        loaded: The job that this process was forked with.
    """

    run_dir: Path
    began: float
    listening_socket: socket.socket
    secret: Secret
    incarnation: int
    terminal_fd: int | None
    report: Callable[[str], None]
    start: str = "spawn"
    loaded: LoadedJob | None = None


class ServerProcess:
    """The session of the run, and the service that the workers reach.

    The main thread runs `run`. Threads of the transport call `Session.observe` under the service's lock; evaluations and the
    writing of checkpoints have a thread each. What the main thread reads without that lock (whether the run has ended, how many
    workers there are) it reads again a moment later.

    Args:
        job: The run.
        args: The arguments of the process.
    """

    def __init__(self, job: LiveJob, args: ServerArgs) -> None:
        self.args = args
        self.config = job.config
        self.options = job.config.rpc
        self.clock = Stopwatch()
        self.stop_asked = threading.Event()
        self.over = threading.Event()
        """Set where the run has ended or is to be stopped, so that the main thread notices at once."""
        self.stop_status: dict[str, str] = {}
        """Status and reason, as the supervisor has sent them."""
        self.all_workers_ended = ""
        """The reason, from the supervisor, why no worker is left; empty while there is one."""
        self._executors = [ThreadPoolExecutor(1, thread_name_prefix=name) for name in ("evaluation", "checkpoint")]
        evaluation, checkpoint = self._executors
        self.session = Session(
            job,
            args.run_dir,
            evaluation,
            checkpoint,
            self.clock,
            began=args.began,
            continue_clock=self.clock.continue_from,
            extra_metrics=self._lock_times,
            terminal=args.terminal_fd,
        )
        self.session.evaluations.ends_now = self.stop_asked.is_set
        server = self.session.server
        self.transport = job.config.transport.server_side()
        snapshots = 1 if server.scheduler.BARRIER else server.num_workers
        gpu = None
        if server.device.type == "cuda":
            gpu = GpuSide(server.device, self.transport.memory)
            gpu.reserve(server.params, snapshots + 1)  # and the newest
        elif self.transport.memory is not None:
            server.algorithm.kernel = replace(server.algorithm.kernel, empty=pooled(self.transport.memory))
        server.snapshots.reserve(snapshots)
        rolled_back = self.session.counters.rolled_back
        self.session.open(incarnation=args.incarnation)
        self._rolled_back = self.session.counters.rolled_back - rolled_back
        self._injector = FaultInjector(self.options.faults, None, args.incarnation, args.report)
        self.service = Service(
            server,
            self._observe,
            self._on_start,
            journal=self.session.journal,
            push_format=job.push_format(),
            max_not_finite=self.options.max_not_finite,
            defer_shutdown=True,
            gpu=gpu,
        )
        self.requested = RequestedCheckpoint(self.session, self.service.lock)
        self.devices = WorkerDevices()
        self.shared_values = SharedValues(self.config.num_processes + 1)
        self.start_check = self._begin_start_check(job)
        self.watchdog = Watchdog(
            self.service,
            self.session.directory,
            self.options,
            address=address_of(args.listening_socket),
            control=job.config.control,
            start=args.start,
        )
        _log.info("processes start by %s", args.start)

    def run(self) -> dict[str, Any]:
        """Record until the run is over and the workers have left; return the summary.

        Raises:
            RuntimeError: the run cannot continue.
        """
        server, checkpoint = self.session.server, Interval(self.config.checkpoint.every_seconds)
        if self.args.incarnation > 0:
            _log.warning(
                "the server resumes from iteration %d; %d later updates are rolled back", server.iteration, self._rolled_back
            )
        # An earlier incarnation may have applied the last gradient, and died before its last replies were sent.
        if server.ended or not self._wait_for_start():
            return self._shut_down()
        limit = self.config.train.max_seconds
        while not (server.ended or self.stop_asked.is_set() or self.over.wait(FLUSH_SECONDS)):
            check_state(self.service)
            self.watchdog.check()
            if self.clock() > WAIT_SECONDS:  # no worker waits for it any more
                self._end_start_check()
            if checkpoint.due():
                with self.service.lock:
                    self.session.copy_state()
            self.requested.attend()
            if limit is not None and self.clock() >= limit:
                limit = None
                self.service.finish()
            self.session.flush()
            if self.session.stops_early():
                self.service.finish()
            cause = self.all_workers_ended if not self.service.memberships else ""
            cause = cause or self.watchdog.no_workers_reason()
            if cause:
                reason = f"no worker is left: {cause}"
                self.stop_status = {"status": "failed", "reason": reason}
                self._shut_down()
                raise RuntimeError(reason)
        return self._shut_down()

    def handle(self, message: dict[str, Any]) -> None:
        """Handle a message of the supervisor or of a signal; called by one thread at a time, which is not the main one."""
        if "worker_ended" in message:
            for worker in range(message["worker_ended"], self.service.server.num_workers, self.config.num_processes):
                self.service.stop_expecting(worker)
        elif "worker_died" in message:
            self.watchdog.explain(*message["worker_died"])
        elif "all_workers_ended" in message:
            self.all_workers_ended = message["all_workers_ended"]
        elif "checkpoint" in message:
            self.requested.ask()
        elif not self.stop_asked.is_set():  # the supervisor's message and a signal, maybe repeated, are one
            self.stop_status = message["stop"]
            self.stop_asked.set()
            self.over.set()

    def _wait_for_start(self) -> bool:
        """Wait until the workers have registered; return False where the run is stopped before.

        A later incarnation of the server starts with those that have joined in time, since others may never do.

        Raises:
            TimeoutError: they have not.
        """
        began = time.monotonic()
        barrier, options = self.service.barrier, self.options
        while not barrier.passed.wait(FLUSH_SECONDS):
            if self.stop_asked.is_set():
                return False
            if self.service.evictions:  # the process that replaces a worker takes no part
                self._end_start_check()
            self.watchdog.check()
            self.requested.attend()
            self.session.flush()
            waited = time.monotonic() - began
            if self.args.incarnation > 0 and waited > options.regroup_seconds:
                self.service.start()
            if waited > options.start_timeout_seconds or (self.all_workers_ended and not self.service.memberships):
                registered = {membership.worker for membership in barrier.registered}
                expected = self.session.server.num_workers
                missing = min(set(range(expected)) - registered, default=0)
                raise TimeoutError(
                    self.all_workers_ended
                    or f"worker {missing} was not ready within runtime.start_timeout_seconds="
                    f"{options.start_timeout_seconds:g} ({len(registered)} of {expected} were); see its log"
                )
        return True

    def _begin_start_check(self, job: LiveJob) -> StartCheck | None:
        """Take part in the check of the initial parameters; None where there is none."""
        compared = self.args.incarnation == 0 and self.config.control == "rpc"
        digest = job.initial_digest() if compared else None
        if digest is None:
            self.shared_values.close()
            return None
        return StartCheck(
            0,
            self.config.num_processes + 1,
            digest,
            self.shared_values.answer,
            host=specific_address(self.args.listening_socket.getsockname()[0]),
            timeout_seconds=self.options.start_timeout_seconds,
        )

    def _end_start_check(self) -> None:
        if self.start_check is not None:
            self.start_check.finish(0.0)
            self.shared_values.close()
            self.start_check = None

    def _shut_down(self) -> dict[str, Any]:
        timeout_seconds = self.options.stop_timeout_seconds
        try:
            parts = self.session, self.service, self.watchdog, self.devices
            summary = shut_down(*parts, status=self.stop_status, timeout_seconds=timeout_seconds)
            self.requested.finish()
            return summary
        finally:
            for executor in self._executors:
                executor.shutdown(wait=False, cancel_futures=True)

    def _on_start(self) -> None:
        self.clock.start()
        self.session.training_begins()
        self.watchdog.remember_processes()

    def _observe(self, server: ParameterServer) -> None:
        self.session.observe(server)
        self._injector.applied(server.iteration)
        if server.ended:
            self.over.set()

    def _lock_times(self) -> dict[str, float]:
        return {"lock_wait_seconds": self.service.lock_wait_seconds, "lock_held_seconds": self.service.lock_held_seconds}


def serve(
    args: ServerArgs, on_ready: Callable[[ServerProcess], None], make_job: Callable[[ServerArgs], LiveJob] | None = None
) -> dict[str, Any]:
    """Run the server of a run from start to end, and return the summary.

    Args:
        args: The arguments of the process.
        on_ready: Called with the process as soon as it can be asked to stop.
        make_job: Makes the run; by default that of the configuration in the run directory.
    """
    job = (make_job or _configured_job)(args)
    config = job.config
    process = ServerProcess(job, args)
    sys.setswitchinterval(SWITCH_SECONDS)
    serving = Serving(
        transport=config.transport.name,
        control=config.control,
        config=(args.run_dir / "config.yaml").read_text(),
        fingerprint=process.session.job.fingerprint().to_dict(),
        heartbeat_seconds=config.rpc.heartbeat_seconds,
        worker_timeout_seconds=config.rpc.worker_timeout_seconds,
        call_timeout_seconds=config.rpc.rpc_timeout_seconds,
        answers={COLLECTIVES: process.shared_values.answer, DEVICES: process.devices.answer},
    )
    if config.lacks_rpc:
        _log.warning("%s; the run goes on without its agents, as with runtime.control=socket", torch_rpc.unavailable())
    on_ready(process)
    process.service.on_ended = process.transport.session_ended
    with served(args.listening_socket, args.secret, process.service, process.transport, serving):
        summary = process.run()
    end_service()
    return summary


def _configured_job(args: ServerArgs) -> LiveJob:
    file = args.run_dir / "config.yaml"
    return job_of(file.read_text(), args.loaded, lambda _: load_config(file))
