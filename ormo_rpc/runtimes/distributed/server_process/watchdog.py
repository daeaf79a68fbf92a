"""The watchdog: evicts workers that are too late, and records processes and evictions in the run directory."""

from __future__ import annotations

import logging
import os
import time

from ormo_rpc.config.runtimes import RpcRuntime
from ormo_rpc.runtimes.distributed.server_process.service import Service
from ormo_rpc.storage.run_directory import RunDirectory

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
    """

    def __init__(self, service: Service, directory: RunDirectory, options: RpcRuntime, address: str, control: str) -> None:
        self.service = service
        self.directory = directory
        self.options = options
        self.address = address
        self.control = control
        service.evictions = directory.read_evictions()  # by earlier incarnations
        self._evictions_written = len(service.evictions)
        self._processes: dict[int, int] = {}
        """Process ids by worker number, at the last change before the end."""
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
        self.directory.write_processes(os.getpid(), self._processes, self.address, control=self.control, transports=transports)

    def write_evictions(self) -> None:
        """Write the evictions since the last call; later incarnations read them."""
        new = self.service.evictions[self._evictions_written :]
        if new:
            self._evictions_written += len(new)
            self.directory.write_evictions(new)

    def no_workers_reason(self) -> str:
        """The reason to give up, if there has been no worker for too long; empty otherwise."""
        if self.service.memberships:
            self._no_workers_since = time.monotonic()
            return ""
        timeout_seconds = self.options.start_timeout_seconds
        if time.monotonic() - self._no_workers_since <= timeout_seconds:
            return ""
        return f"no worker for runtime.start_timeout_seconds={timeout_seconds:g}"
