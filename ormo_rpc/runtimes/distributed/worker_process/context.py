"""The arguments of a worker's process, and what its loops share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ormo_rpc.config.parsing import parse_text
from ormo_rpc.config.schema import Config
from ormo_rpc.control.joining import Joined
from ormo_rpc.rendezvous.secret import Secret
from ormo_rpc.runtimes.collectives import COLLECTIVES
from ormo_rpc.runtimes.job import Job, LoadedJob, job_of
from ormo_rpc.runtimes.start_check import StartCheck


@dataclass(frozen=True, kw_only=True)
class WorkerArgs:
    """The arguments of a worker's process.

    Attributes:
        address: Host and port of the server's listener.
        secret: Of the run.
        preferred_worker: The worker number to have, if it is free.
        slot_id: The launcher's process slot; a replacement comes from the same one.
        restart_count: Earlier processes in this slot.
        data_root: The folder of the data set on this machine; by default the configured one.
        transport: Keys and values of the transport; by default the configured one, and the server has to serve it.
        timeout_seconds: Time for reaching the server.
        report: Called with messages for people.
        on_joined: Called whenever it has joined.
        announce: Report joining and the transport, which a worker on the server's machine leaves to the server's log.
        loaded: The job that this process was forked with.
    """

    address: tuple[str, int]
    secret: Secret
    preferred_worker: int | None
    slot_id: str
    restart_count: int
    data_root: str | None
    timeout_seconds: float
    report: Callable[[str], None]
    on_joined: Callable[[], None]
    transport: Mapping[str, Any] | None = None
    announce: bool = False
    loaded: LoadedJob | None = None


class WorkerContext:
    """State that the loops of one process share.

    `compute_lock` guards the processor and all that belongs to the process: the job, torch's random state, autograd. A loop
    holds it while it computes, and never while it waits for the network.

    Args:
        args: The arguments of the process.

    Attributes:
        leaving: Set once this process has been asked to leave; read without a lock.
        start_check: The check of the initial parameters, once it has begun.
    """

    def __init__(self, args: WorkerArgs) -> None:
        self.args = args
        self.compute_lock = threading.Lock()
        self.leaving = False
        self.start_check: StartCheck | None = None
        self._config_text = ""
        self._job: Job | None = None

    def job(self, config_text: str) -> Job:
        """The job of a configuration, with its data loaded, which is done once; to be called with the lock."""
        if self._job is None or config_text != self._config_text:
            args = self.args
            loaded = args.loaded if args.data_root is None and args.transport is None else None

            def parse(text: str) -> Config:
                config = parse_text(text, data_root=args.data_root, transport=args.transport)
                config.refuse_unavailable()
                return config

            self._job = job_of(config_text, loaded, parse)
            self._config_text = config_text
        return self._job

    def begin_start_check(self, membership: Joined, job: Job) -> None:
        """Begin to compare the initial parameters with those of all other processes, in the first one of an initial worker.

        To be called with the lock, and before parameters change.
        """
        args, worker = self.args, membership.response.worker
        if self.start_check is not None or args.restart_count > 0 or membership.lease.admission.control != "rpc":
            return
        if worker == args.preferred_worker:
            self.start_check = StartCheck(
                1 + worker,
                1 + job.config.num_processes,
                job.initial_digest(),
                lambda request: membership.control.ask(membership.response.session_id, COLLECTIVES, request),
                host=membership.lease.local_host,
                timeout_seconds=args.timeout_seconds,
            )
