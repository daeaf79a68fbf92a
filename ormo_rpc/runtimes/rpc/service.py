"""The server's side of the wire: handlers that take a push, hold the lock for the ordered-momentum step, and answer by Futures.

No handler ever waits for another worker: one whose answer is not due returns a Future that stays open, and the handler of the
push that makes the answer due completes it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable

import torch.distributed.rpc as rpc
from torch import Tensor
from torch.futures import Future

from ormo_rpc.errors import NonFiniteGradient, PushRefused
from ormo_rpc.flat import Layout
from ormo_rpc.messages import Push, Reply
from ormo_rpc.server import ParameterServer

_Due = tuple[Future[Reply], Reply | TimeoutError]
"""A Future and what it is to be completed with."""


class Service:
    """What workers reach through an RRef.

    `lock` guards the parameter server with all that belongs to it, the open Futures, the list of processes and the times
    measured here. Payload checks run before it is taken, replies are sent after it is released.

    Args:
        server: The parameter server.
        observe: Called under the lock after every push that changed something; it must be quick.
        on_start: Called under the lock when all workers are there, before the first ticket is handed out.
    """

    def __init__(
        self,
        server: ParameterServer,
        observe: Callable[[ParameterServer], None],
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        self.server = server
        self.observe = observe
        self.on_start = on_start
        self.lock = threading.Lock()
        self.lock_wait_seconds = 0.0
        self.lock_held_seconds = 0.0
        self.processes: dict[int, int] = {}
        """The process number of each worker that said hello."""
        self.gone: set[int] = set()
        """Workers that said goodbye."""
        self.started = threading.Event()
        self.broken: Exception | None = None
        """What went wrong while a push was applied; the server's state is not to be trusted then."""
        self._handed: dict[int, float] = {}
        """When each worker was given its newest ticket."""
        self._open: dict[int, Future[Reply]] = {}
        self._buffers = Layout(server.buffers.average)

    # ------------------------------------------------------------------------------------------------- called by workers

    @staticmethod
    @rpc.functions.async_execution
    def hello(service: rpc.RRef[Service], worker: int, process: int) -> Future[Reply]:
        """Say that a worker is ready; its first reply comes when all are.

        Raises:
            PushRefused: there is no such worker, or it said hello before.
        """
        self = service.local_value()
        with self.lock:
            if worker in self.processes or not 0 <= worker < self.server.num_workers:
                raise PushRefused(f"hello: got worker {worker}, expected one below {self.server.num_workers} that is new here")
            future = Future[Reply]()
            due = self._expect(worker, future)
            self.processes[worker] = process
            complete = len(self.processes) == self.server.num_workers
            if complete:
                self.on_start()
            due += self._due(self.server.start() if complete else [])
        _settle(due)
        if complete:
            self.started.set()
        return future

    @staticmethod
    @rpc.functions.async_execution
    def push(
        service: rpc.RRef[Service],
        worker: int,
        ticket: int,
        stamp: int,
        incarnation: int,
        loss: float | None,
        samples: int,
        payload: Tensor,
    ) -> Future[Reply]:
        """Deliver the gradient of a ticket; the next reply is the answer.

        Args:
            service: The service, owned by the server's process.
            worker: See `Push`, as for the following ones.
            ticket: Likewise.
            stamp: Likewise.
            incarnation: Likewise.
            loss: Likewise.
            samples: Likewise.
            payload: Gradient and, behind it, the batch-norm statistics, as one flat tensor.

        Raises:
            PushRefused: as `ParameterServer.receive`; it is raised at the caller.
        """
        self = service.local_value()
        dimension = max(0, payload.numel() - self._buffers.size)
        grad, statistics = payload.reshape(-1).split([dimension, payload.numel() - dimension])
        whole = statistics.numel() == self._buffers.size
        push = Push(
            worker=worker,
            ticket=ticket,
            stamp=stamp,
            grad=grad,
            loss=loss,
            samples=samples,
            buffers=self._buffers.views(statistics) if whole else {},
            incarnation=incarnation,
        )
        return self._receive(push)

    @staticmethod
    def goodbye(service: rpc.RRef[Service], worker: int) -> None:
        """Say that a worker that was told to stop is leaving."""
        self = service.local_value()
        with self.lock:
            self.gone.add(worker)

    # ---------------------------------------------------------------------------------------- called in the server's process

    def call(self, change: Callable[[ParameterServer], list[Reply]]) -> None:
        """Change the server from outside of a push, and send the replies that this makes due."""
        with self.lock:
            due = self._due(change(self.server))
        _settle(due)

    def late(self, patience_seconds: float) -> list[int]:
        """Workers that have held a ticket for longer than that."""
        with self.lock:
            now = time.monotonic()
            return [worker for worker in self.server.ledger.holding if now - self._handed[worker] > patience_seconds]

    def _receive(self, push: Push) -> Future[Reply]:
        """Apply a push; where that fails by no fault of its sender, the Future stays open, as the server is about to end."""
        try:
            grad_sum = self.server.check(push)
        except NonFiniteGradient:
            grad_sum = None
        future = Future[Reply]()
        asked = time.perf_counter()
        with self.lock:
            taken = time.perf_counter()
            if self.broken is not None:
                return future
            try:
                replies = self.server.reject(push) if grad_sum is None else self.server.redeem(push, grad_sum)
                self.observe(self.server)
            except PushRefused:
                raise
            except Exception as error:
                self.broken = error
                return future
            due = self._expect(push.worker, future) + self._due(replies)
            self.lock_wait_seconds += taken - asked
            self.lock_held_seconds += time.perf_counter() - taken
        _settle(due)
        return future

    def _expect(self, worker: int, future: Future[Reply]) -> list[_Due]:
        """Under the lock: open the Future of a worker's next reply; a repeated call takes the place of the former."""
        former = self._open.get(worker)
        self._open[worker] = future
        return [] if former is None else [(former, TimeoutError(f"worker {worker} has asked again"))]

    def _due(self, replies: Iterable[Reply]) -> list[_Due]:
        """Under the lock: the Futures that these replies complete.

        Were they looked up when the lock is released, a reply that is late to be sent could answer its worker's next push.
        """
        replies = list(replies)
        self._handed |= {reply.worker: time.monotonic() for reply in replies}
        return [(self._open.pop(reply.worker), reply) for reply in replies if reply.worker in self._open]


def _settle(due: Iterable[_Due]) -> None:
    """Complete Futures; a reply never changes after it is issued, so this needs no lock."""
    for future, outcome in due:
        if isinstance(outcome, Reply):
            future.set_result(outcome)
        else:
            future.set_exception(outcome)  # pyright: ignore[reportArgumentType] # as torch has it


_service: rpc.RRef[Service] | None = None


def publish(service: Service) -> None:
    """Make the service known to workers that ask this process for it."""
    global _service  # a function that is called by name from another process has no other way to find it
    _service = rpc.RRef(service)


def published() -> rpc.RRef[Service]:
    """The RRef of this process's service; called by workers."""
    assert _service is not None, "the service is published before any worker is let in"
    return _service


def say_hello(service: rpc.RRef[Service], worker: int, timeout_seconds: float) -> Reply:
    """In a worker: announce it and wait for its first reply."""
    return rpc.rpc_sync(service.owner(), Service.hello, args=(service, worker, os.getpid()), timeout=timeout_seconds)


def deliver(service: rpc.RRef[Service], push: Push, payload: Tensor, *, timeout_seconds: float) -> Reply:
    """In a worker: deliver a push and wait for the reply.

    After a time-out the push is repeated, which never applies it twice, as long as the server answers at all: the reply may
    be held back for longer, at a barrier or at the end of the run, by the slowest worker.

    Raises:
        RuntimeError: the server is gone, or has not answered a question for as long as the time-out.
        PushRefused: the server refused it.
    """
    arguments = (service, push.worker, push.ticket, push.stamp, push.incarnation, push.loss, push.samples, payload)
    while True:
        try:
            return rpc.rpc_sync(service.owner(), Service.push, args=arguments, timeout=timeout_seconds)
        except TimeoutError:
            pass  # an older try of this very push was handled after this one
        except RuntimeError as error:
            if not _is_timeout(error):
                raise
        rpc.rpc_sync(service.owner(), published, timeout=timeout_seconds)


def _is_timeout(error: RuntimeError) -> bool:
    return str(error).startswith("RPCErr:1")


def say_goodbye(service: rpc.RRef[Service], worker: int, timeout_seconds: float) -> None:
    """In a worker: leave. A server that has gone already needs no goodbye."""
    try:
        rpc.rpc_sync(service.owner(), Service.goodbye, args=(service, worker), timeout=timeout_seconds)
    except RuntimeError:
        return
