"""From reply to push, one ticket at a time, until told to stop, through as many lives of the server as it takes.

A worker's process has one such loop, or with ``worker.prefetch`` several, each with a membership of its own: while one waits for the
wire, another one computes. To the server and to every algorithm they are workers like any others, so K counts each of them.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch

from ormo_rpc.compression.wire_options import Transport
from ormo_rpc.config.parsing import parse_text
from ormo_rpc.config.schema import Config
from ormo_rpc.errors import RunEnded, ServerLost, StaleSession
from ormo_rpc.messages import Reply
from ormo_rpc.rendezvous.lease import Lease, connect
from ormo_rpc.rendezvous.secret import Secret
from ormo_rpc.runtimes.job import Job, time_generator
from ormo_rpc.transports.base import ServerClient
from ormo_rpc.transports.stream.client import StreamClient
from ormo_rpc.transports.stream.shared_memory import AVAILABLE, SharedMemoryPool
from ormo_rpc.transports.torch_rpc.agent import rpc_agent
from ormo_rpc.transports.torch_rpc.client import TorchRpcClient
from ormo_rpc.worker.faults import FaultInjector
from ormo_rpc.worker.worker import Worker

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WorkerArgs:
    """What a worker's process is told when it is started.

    Attributes:
        door: Finds the server.
        secret: Of the run.
        wanted: The worker number to have, if it is free.
        slot: Who keeps this process running.
        life: How often this process was started before.
        data_root: Where the data set lies on this machine, if not where the run's configuration says.
        timeout_seconds: How long to look for the server.
        tell: Called with what people should know.
    """

    door: Callable[[], tuple[str, int]]
    secret: Secret
    wanted: int | None
    slot: str
    life: int
    data_root: str | None
    timeout_seconds: float
    tell: Callable[[str], None]


class WorkerContext:
    """What the loops of one process share.

    `turn` guards the processor and all that is the process's own: the job, torch's source of chance, autograd. Whoever computes
    holds it; nobody waits for the network with it.

    Args:
        place: Where and as whom to work.
    """

    def __init__(self, place: WorkerArgs) -> None:
        self.place = place
        self.turn = threading.Lock()
        self.leaving = False
        """Whether we have been asked to leave."""
        self._config_text = ""
        self._job: Job | None = None

    def job(self, config_text: str) -> Job:
        """The job of that configuration, with its data loaded, which is done once; to be called with the turn."""
        if self._job is None or config_text != self._config_text:
            self._job = Job(parse_text(config_text, data_root=self.place.data_root))
            self._config_text = config_text
        return self._job


class WorkerLoop:
    """One membership, and the worker that sits there.

    Args:
        context: Shared with the other loops of this process.
        wanted: The worker number to have, if it is free.
    """

    def __init__(self, context: WorkerContext, wanted: int | None) -> None:
        self.context = context
        self.lease: Lease | None = None
        self._wanted = wanted
        self._job: Job | None = None
        self._worker: Worker | None = None
        self._segments: SharedMemoryPool | None = None
        """Where the worker's payload lies, if the server may read it from there."""
        self._injector: FaultInjector | None = None

    def run(self, on_job: Callable[[Job], None] = lambda _: None) -> None:
        """WorkerProcess until told to stop; a server that is lost may come back, and one that has evicted us may let us in again.

        Args:
            on_job: Called whenever we know what to work on.

        Raises:
            ServerLost: it did not come back in time.
            WorkerBanned: this worker is not wanted any more.
        """
        place, context = self.context.place, self.context
        while not context.leaving:
            try:
                lease = connect(
                    place.door(),
                    place.secret,
                    preferred_worker=self._wanted,
                    slot_id=place.slot,
                    timeout_seconds=place.timeout_seconds,
                    stopping=lambda: context.leaving,
                )
            except RunEnded as end:
                _log.info("%s", end)
                return
            except ServerLost:
                if context.leaving:
                    return
                raise
            with lease:
                self.lease = lease
                self._wanted = lease.join_response.worker
                if context.leaving:  # `leave` came while we were let in, and did not know of this lease
                    lease.leave()
                job, worker = self._prepare(lease.join_response.config)
                on_job(job)
                try:
                    with self._calls(job.config, worker, lease) as server:
                        self._until_stopped(job.config, worker, server, lease.join_response.worker)
                        server.leave()
                    return
                except (ServerLost, StaleSession) as error:
                    _log.info("joining again: %s", error)

    def leave(self) -> None:
        """Ask to leave; called from another thread."""
        if self.lease is not None:
            self.lease.leave()

    def _prepare(self, config_text: str) -> tuple[Job, Worker]:
        """Make the worker, unless it is there from a former life of the server."""
        with self.context.turn:
            job = self.context.job(config_text)
            if self._worker is None or job is not self._job:
                share = AVAILABLE and job.config.wire.transport.may_share
                self._segments = SharedMemoryPool() if share else None
                self._worker = job.worker(None if self._segments is None else self._segments.vector)
                self._worker.warm_up()
                self._job = job
            self._worker.forget()  # to the server, who is let in is somebody new
            return job, self._worker

    @contextlib.contextmanager
    def _calls(self, config: Config, worker: Worker, lease: Lease) -> Generator[ServerClient]:
        """The way to the server that the configuration says."""
        timeout, transport, number = config.rpc.rpc_timeout_seconds, config.wire.transport, lease.join_response.worker
        if transport is Transport.uv:
            with rpc_agent(f"worker{number}", number + 1, server=lease.join_response.agent, timeout_seconds=timeout):
                yield TorchRpcClient(lease.join_response.session_id, timeout)
            return
        with StreamClient(
            lease,
            self.context.place.secret,
            worker.payload,
            self._segments,
            must_share=transport is Transport.shm,
            timeout_seconds=timeout,
        ) as calls:
            yield calls

    def _until_stopped(self, config: Config, worker: Worker, server: ServerClient, number: int) -> None:
        if self._injector is None:
            self._injector = FaultInjector(config.rpc.faults, number, self.context.place.life, self.context.place.tell)
        speed: torch.Generator = time_generator(config, number)
        reply: Reply = server.register()
        while reply.ticket is not None:
            began = time.monotonic()
            worker.load(reply)
            waited = time.monotonic()
            with self.context.turn:
                began += time.monotonic() - waited
                push = worker.compute(reply)
                slowdown = config.slowdown(number, speed)
                time.sleep((slowdown - 1) * (time.monotonic() - began))
                self._injector.before_push(worker.payload)
            reply = server.push(push, worker.payload)
            if self._injector.drops_reply():
                reply = server.push(push, worker.payload)
