"""The watchdog: evicts workers that are too late, and records processes and evictions in the run directory."""

from __future__ import annotations

import logging
import os
import socket
import time

from ormo_rpc.config.runtimes import RpcRuntime
from ormo_rpc.runtimes.distributed.memory import proportional_bytes
from ormo_rpc.runtimes.distributed.server_process.service import Service
from ormo_rpc.storage.run_directory import RunDirectory

CAUSE_SECONDS = 0.25
"""The launcher has told by then how a worker died whose connection was closed."""
FIRST_MEASUREMENT_SECONDS = 2.0
"""Of training, after which memory is measured first; a shorter run spares the time."""
MEASUREMENT_SECONDS = 300.0
"""The interval of further measurements."""
MEASURED_WORKERS = 3
"""The kernel takes up to 0.1 s for each process."""
_log = logging.getLogger(__name__)


class Watchdog:
    """Evicts late workers, and records processes and evictions; used by the main thread, but for `remember_processes`.

    The service's lock guards `_processes` while it is written.

    Args:
        service: The service.
        directory: Receives ``processes.json`` and ``evictions.jsonl``.
        options: The time-outs.
        address: HOST:PORT of the listener.
        control: The carrier of the control plane.
        start: The way in which processes are started.

    Attributes:
        memory: The largest ones measured so far, as entries of the summary.
    """

    def __init__(
        self,
        service: Service,
        directory: RunDirectory,
        options: RpcRuntime,
        *,
        address: str,
        control: str,
        start: str,
    ) -> None:
        self.service = service
        self.directory = directory
        self.options = options
        self.address = address
        self.control = control
        self.start = start
        service.evictions = directory.read_evictions()  # by earlier incarnations
        self._evictions_written = len(service.evictions)
        self._unwritten_since: float | None = None
        self._causes: dict[int, str] = {}
        """Deaths of processes of this machine, by process id."""
        self._processes: dict[int, int] = {}
        """Process ids by worker number, at the last change before the end."""
        self.memory: dict[str, int] = {}
        self._measure_at: float | None = None
        self._paused = False
        self._no_workers_since = time.monotonic()

    def check(self) -> None:
        """Evict late workers, and write the changes since the last call."""
        service = self.service
        if service.changed.is_set():
            service.changed.clear()
            with service.lock:
                if service.server.ended:
                    return  # all are leaving; the workers before that are of more interest
                self.remember_processes()
            self.write_processes()
        self.write_evictions()
        service.evict_late(self.options.ticket_timeout_seconds)
        if service.barrier.passed.is_set():
            self._measure_memory()
        members, least = len(service.server.members), self.options.min_workers
        if service.barrier.passed.is_set() and self._paused != (members < least):
            self._paused = members < least
            if self._paused:
                _log.warning("paused: %d workers, and runtime.min_workers=%d; waiting for more", members, least)
            else:
                _log.warning("resumed: %d workers", members)

    def remember_processes(self) -> None:
        """Remember the process ids of the current members; called under the service's lock."""
        self._processes = {membership.worker: membership.pid for membership in self.service.memberships.by_worker.values()}

    def write_processes(self) -> None:
        """Write the process ids of the server and of the workers, and how they are connected."""
        transports = dict(self.service.transports)
        self.directory.write_processes(
            os.getpid(), self._processes, self.address, control=self.control, start=self.start, transports=transports
        )

    def explain(self, pid: int, cause: str) -> None:
        """Take down how a worker's process of this machine has died; called in the thread that reads the messages."""
        self._causes[pid] = cause

    def write_evictions(self, *, wait: bool = True) -> None:
        """Write the evictions since the last call; later incarnations read them.

        Args:
            wait: Leave one for later whose cause the launcher may tell in a moment.
        """
        new = self.service.evictions[self._evictions_written :]
        if not new:
            return
        for eviction in new:
            if eviction["host"] == socket.gethostname() and eviction["process"] in self._causes:
                eviction["cause"] = self._causes[eviction["process"]]
        now = time.monotonic()
        self._unwritten_since = now if self._unwritten_since is None else self._unwritten_since
        if not wait or now - self._unwritten_since >= CAUSE_SECONDS or all("cause" in eviction for eviction in new):
            self._unwritten_since = None
            self._evictions_written += len(new)
            self.directory.write_evictions(new)

    def _measure_memory(self) -> None:
        """Measure the server's memory, and that of some workers of this machine, where it is time to."""
        now = time.monotonic()
        if self._measure_at is None:
            self._measure_at = now + FIRST_MEASUREMENT_SECONDS
        if now < self._measure_at:
            return
        self._measure_at = now + MEASUREMENT_SECONDS
        with self.service.lock:
            members = list(self.service.memberships.by_worker.values())
        workers = sorted({member.pid for member in members if member.host == socket.gethostname()})[:MEASURED_WORKERS]
        for name, pids in (("server_memory_bytes", [os.getpid()]), ("worker_memory_bytes", workers)):
            if sizes := [size for size in map(proportional_bytes, pids) if size is not None]:
                self.memory[name] = max(self.memory.get(name, 0), sum(sizes) // len(sizes))

    def no_workers_reason(self) -> str:
        """The reason to give up, if there has been no worker for too long; empty otherwise."""
        if self.service.memberships:
            self._no_workers_since = time.monotonic()
            return ""
        timeout_seconds = self.options.start_timeout_seconds
        if time.monotonic() - self._no_workers_since <= timeout_seconds:
            return ""
        return f"no worker for runtime.start_timeout_seconds={timeout_seconds:g}"
