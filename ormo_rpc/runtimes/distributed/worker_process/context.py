"""The arguments of a worker's process, and what its loops share."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

from ormo_rpc.compression import Allocate
from ormo_rpc.config.parsing import parse_text
from ormo_rpc.config.schema import Config
from ormo_rpc.control.joining import Joined
from ormo_rpc.models.fingerprint import Fingerprint
from ormo_rpc.rendezvous.secret import Secret
from ormo_rpc.runtimes.collectives import COLLECTIVES
from ormo_rpc.runtimes.job import Job, LoadedJob, job_of
from ormo_rpc.runtimes.start_check import StartCheck
from ormo_rpc.worker.base import BaseWorker

W = TypeVar("W", bound=BaseWorker)
W_co = TypeVar("W_co", bound=BaseWorker, covariant=True)


class WorkerJob(Protocol[W_co]):
    """The run as a worker's process sees it: that of a configuration, or a loop of the user's own.

    Attributes:
        SAME_MODEL: What to do so that every process makes the same model, for a message.
    """

    SAME_MODEL: str

    @property
    def config(self) -> Config:
        """The configuration of the run."""
        ...

    def device(self, process: int) -> torch.device:
        """Return the device on which the workers of a process compute; this process uses it from now on."""
        ...

    def worker(self, allocate: Allocate | None = None, device: torch.device | None = None) -> W_co:
        """Make a worker on a device; ``allocate`` makes the memory of its pushes."""
        ...

    def fingerprint(self) -> Fingerprint:
        """Return what it must have in common with the server."""
        ...

    def initial_digest(self) -> Callable[[], bytes] | None:
        """Return a function, for any thread, that hashes the initial parameters; None where these may differ."""
        ...


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
        device: The device, in place of the configured ``worker.device``.
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
    device: str | None = None
    announce: bool = False
    loaded: LoadedJob | None = None


def configured_job(args: WorkerArgs, text: str) -> Job:
    """Make the job of the server's configuration, given as YAML, or take the one that this process was forked with.

    Raises:
        ConfigError: this machine cannot run it.
    """

    def parse(text: str) -> Config:
        config = own_config(args, text)
        config.refuse_unavailable()
        return config

    own = args.data_root is not None or args.transport is not None or args.device is not None
    return job_of(text, None if own else args.loaded, parse)


def own_config(args: WorkerArgs, text: str) -> Config:
    """Read the server's configuration, with what is this machine's own.

    Raises:
        ConfigError: the text does not fit the schema.
    """
    config = parse_text(text, data_root=args.data_root, transport=args.transport)
    if args.device is None:
        return config
    return dataclasses.replace(config, worker=dataclasses.replace(config.worker, device=args.device))


class WorkerContext(Generic[W]):
    """State that the loops of one process share.

    `compute_lock` guards the processor and all that belongs to the process: the job, torch's random state, autograd. A loop
    holds it while it computes, and never while it waits for the network.

    Args:
        args: The arguments of the process.
        make_job: Makes the job of the server's configuration, given as YAML.

    Attributes:
        leaving: Set once this process has been asked to leave; read without a lock.
        start_check: The check of the initial parameters, once it has begun.
    """

    def __init__(self, args: WorkerArgs, make_job: Callable[[str], WorkerJob[W]]) -> None:
        self.args = args
        self._make_job = make_job
        self.compute_lock = threading.Lock()
        self.leaving = False
        self.start_check: StartCheck | None = None
        self._config_text = ""
        self._job: WorkerJob[W] | None = None

    def job(self, config_text: str) -> WorkerJob[W]:
        """The job of a configuration, which is made once; to be called with the lock."""
        if self._job is None or config_text != self._config_text:
            self._job = self._make_job(config_text)
            self._config_text = config_text
        return self._job

    def begin_start_check(self, membership: Joined, job: WorkerJob[W]) -> None:
        """Begin to compare the initial parameters with those of all other processes, in the first one of an initial worker.

        To be called with the lock, and before parameters change.
        """
        args, worker = self.args, membership.response.worker
        if self.start_check is not None or args.restart_count > 0 or membership.lease.admission.control != "rpc":
            return
        if worker != args.preferred_worker or (digest := job.initial_digest()) is None:
            return
        self.start_check = StartCheck(
            1 + worker,
            1 + job.config.num_processes,
            digest,
            lambda request: membership.control.ask(membership.response.session_id, COLLECTIVES, request),
            host=membership.lease.local_host,
            timeout_seconds=args.timeout_seconds,
        )
