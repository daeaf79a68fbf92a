"""One membership and its worker: from reply to push, one ticket at a time, across incarnations of the server."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Generator
from typing import Any, Generic

import torch

from ormo_rpc.config.schema import Config
from ormo_rpc.control.joining import Joined, joined
from ormo_rpc.control.messages import JoinRequest
from ormo_rpc.errors import ConfigError, Refused, RunEnded, ServerLost, StaleSession, one_line
from ormo_rpc.messages import Push, Reply
from ormo_rpc.models.fingerprint import Fingerprint
from ormo_rpc.rendezvous.connecting import Patience
from ormo_rpc.runtimes.configured import time_generator
from ormo_rpc.runtimes.distributed.shortages import limit_reached
from ormo_rpc.runtimes.distributed.worker_devices import DeviceReports
from ormo_rpc.runtimes.distributed.worker_process.context import W, WorkerContext, WorkerJob
from ormo_rpc.transports.base import Endpoint, ServerClient, WorkerSide
from ormo_rpc.worker.faults import CONNECT, JOIN, FaultInjector

_log = logging.getLogger(__name__)


class _JoinAgain(Exception):
    """The membership has ended before the run."""


class WorkerLoop(Generic[W]):
    """One membership, and its worker, across incarnations of the server.

    Args:
        context: Shared with the other loops of this process.
        preferred_worker: The worker number to have, if it is free.
    """

    def __init__(self, context: WorkerContext[W], preferred_worker: int | None) -> None:
        self.context = context
        self._membership: Joined | None = None
        self._preferred_worker = preferred_worker
        self._job: WorkerJob[W] | None = None
        self._worker: W | None = None
        self._transport: WorkerSide | None = None
        self._injector: FaultInjector | None = None
        self._slowdown: Callable[[], float] = lambda: 1.0
        self._devices: DeviceReports | None = None
        self._paths = contextlib.ExitStack()
        self._patience: Patience | None = None
        """From the first path for pushes that could not be opened, until one is."""

    @property
    def worker(self) -> W:
        """The worker that the newest reply is for."""
        assert self._worker is not None, "it is made before the first reply"
        return self._worker

    def replies(self, on_job: Callable[[WorkerJob[W]], None] = lambda _: None) -> Generator[Reply, Push]:
        """Yield the replies with a ticket, to the end of the run; join again where the server was lost or has evicted it.

        Each is answered by sending the push (`Generator.send`), which brings the next reply: of another membership, where the
        push came too late and is dropped. To close the generator is to leave; a ticket that is held then is issued again.

        Args:
            on_job: Called with the job whenever this worker has joined.

        Raises:
            ServerLost: the server did not come back in time.
            WorkerBanned: the server has banned this worker.
        """
        context = self.context
        with self._paths:
            while not context.leaving:
                try:
                    yield from self._membership_replies(on_job)
                    return
                except RunEnded as end:
                    _log.info("%s", end)
                    return
                except _JoinAgain as error:
                    _log.info("joining again: %s", error)
                except ServerLost:
                    if context.leaving:
                        return
                    raise

    def before_push(self, seconds: float) -> None:
        """Take longer, as ``heterogeneity`` has it, and let faults happen; called when a push is made, and not sent yet.

        Args:
            seconds: The processor time that it took to make (`cpu_seconds`).
        """
        self.slow_down(seconds)
        self.complete_push()

    def slow_down(self, seconds: float) -> None:
        """Take longer, as ``heterogeneity`` has it, than these seconds of the processor."""
        time.sleep((self._slowdown() - 1) * seconds)

    def complete_push(self) -> None:
        """Wait until the push lies in the memory that it is sent from, and let faults happen to it."""
        self.worker.wait_for_copy()
        assert self._injector is not None, "it is made before the first reply"
        self._injector.before_push(self.worker.corruptible)

    def _membership_replies(self, on_job: Callable[[WorkerJob[W]], None]) -> Generator[Reply, Push]:
        """Yield the replies to one membership, to the end of the run.

        Raises:
            ServerLost: no server could be joined in time.
            RunEnded: the run is over.
            _JoinAgain: the membership has ended before the run.
        """
        args, context = self.context.args, self.context
        request = JoinRequest(
            preferred_worker=self._preferred_worker, pid=os.getpid(), host=socket.gethostname(), slot_id=args.slot_id
        )
        joining = joined(
            args.address, args.secret, request, timeout_seconds=args.timeout_seconds, stopping=lambda: context.leaving
        )
        with joining as membership:
            self._membership = membership
            self._preferred_worker = number = membership.response.worker
            if self._leaves(membership):  # `leave` was called before this membership existed
                return
            job, worker, transport = self._prepare(membership)
            if self._leaves(membership):
                return
            if self._injector is None:
                self._injector = FaultInjector(job.config.rpc.faults, number, args.restart_count, args.report)
            on_job(job)
            self._injector.joining(JOIN)
            paths = [(job.config.transport.name, "asked for")]
            endpoint = Endpoint(
                lease=membership.lease,
                control=membership.control,
                joined=membership.response,
                transport=job.config.transport.name,
                secret=args.secret,
                timeout_seconds=job.config.rpc.rpc_timeout_seconds,
                chosen=lambda *path: paths.append(path),
            )
            opened = False
            try:
                with transport.connect(endpoint, worker.wire) as server:
                    opened = True
                    self._set_patience(None)
                    args.on_joined()
                    if args.announce:
                        args.report("joined as worker {}; pushes by {}: {}".format(number, *paths[-1]))
                    self._injector.joining(CONNECT)
                    yield from self._work(job.config, server, membership, self._injector)
                    server.leave()
            except (ServerLost, StaleSession) as error:
                if not opened:
                    self._path_failed(error)
                raise _JoinAgain(str(error)) from None

    def _path_failed(self, error: Exception) -> None:
        """Note that no path for pushes could be opened.

        Raises:
            ServerLost: none could for too long.
        """
        if self._patience is None:
            self._set_patience(Patience("no path for pushes can be opened", self.context.args.timeout_seconds))
        assert self._patience is not None
        self._patience.failed(error)
        if self._patience.left_seconds <= 0:
            raise ServerLost(self._patience.given_up()) from None

    def _set_patience(self, patience: Patience | None) -> None:
        self._paths.close()
        self._patience = patience and self._paths.enter_context(patience)

    def leave(self) -> None:
        """Ask to leave; called from another thread."""
        if self._membership is not None:
            self._membership.request_leave()

    def _leaves(self, membership: Joined) -> bool:
        """Leave where this process has been asked to; a worker that has not registered holds no ticket."""
        if self.context.leaving:
            membership.request_leave()
        return self.context.leaving

    def _prepare(self, membership: Joined) -> tuple[WorkerJob[W], W, WorkerSide]:
        """Make the worker, unless there is one from an earlier incarnation of the server.

        Raises:
            ConfigError: it cannot be made, or cannot compute a first gradient.
            Refused: its model or data set is not the server's.
        """
        with self.context.compute_lock:
            worker, transport = self._worker, self._transport
            with _final_errors():
                job = self.context.job(membership.response.config)
                if worker is None or transport is None or job is not self._job:
                    device = job.device(job.config.process_of(membership.response.worker))
                    transport = job.config.transport.worker_side()
                    transport.page_locked = device.type == "cuda"
                    transport.gpu = device if device.type == "cuda" and job.config.server.device != "cpu" else None
                    worker = job.worker(transport.allocate, device)
                    worker.defer_copy()
                    self._devices = DeviceReports(device)
            _check_fingerprint(membership, job)  # again where the server is another process by now
            if worker is not self._worker:
                with _final_errors():
                    self.context.begin_start_check(membership, job)
                    worker.warm_up()
                self._worker, self._transport, self._job = worker, transport, job
            worker.forget()  # to the server, a worker that joins again is a new one
            return job, worker, transport

    def _work(
        self, config: Config, server: ServerClient, membership: Joined, injector: FaultInjector
    ) -> Generator[Reply, Push]:
        assert self._devices is not None, "made with the worker"
        self._devices.begin(membership)
        number = membership.response.worker
        speed: torch.Generator = time_generator(config, number)
        self._slowdown = lambda: config.slowdown(number, speed)
        reply = server.register()
        if self.context.start_check is not None:
            self.context.start_check.finish()
        while reply.ticket is not None:
            push = yield reply
            reply = server.push(push)
            if injector.drops_reply():
                reply = server.push(push)
            self._devices.ticket(membership)


@contextlib.contextmanager
def _final_errors() -> Generator[None]:
    """Turn what a user's model or data set raises into an error that starts no other process in this one's place.

    Raises:
        ConfigError: in place of any error that would come again.
    """
    try:
        yield
    except (ConfigError, OSError):  # the latter may not come again
        raise
    except Exception as error:
        if limit_reached(error):  # nor may this
            raise
        raise ConfigError(f"before the first ticket: {one_line(error)}") from error


def _check_fingerprint(membership: Joined, job: WorkerJob[Any]) -> None:
    """Leave where this process has built another model, or loaded another data set, than the server's process has.

    The initial values of buffers need not agree, since every reply has the server's.

    Raises:
        Refused: names, shapes, frozen values or the data set differ.
    """
    server = Fingerprint.from_dict(membership.response.fingerprint)
    difference = server.difference(job.fingerprint(), "the server", "this worker", buffer_values=False)
    if difference is not None:
        membership.request_leave()
        raise Refused(f"{difference}; every process must make the same: {job.SAME_MODEL}")
