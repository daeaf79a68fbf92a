"""A service behind a listener, and workers that are connected by streams, beside a reference server in process."""

from __future__ import annotations

import random
import socket
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ormo_rpc import build_server
from ormo_rpc.compression import PushFormat
from ormo_rpc.compression.wire_options import WireDtype
from ormo_rpc.control.joining import joined
from ormo_rpc.kernels import pool
from ormo_rpc.messages import Push, Reply
from ormo_rpc.models.flat import Layout
from ormo_rpc.rendezvous.listener import Listener
from ormo_rpc.rendezvous.secret import Secret
from ormo_rpc.runtimes.distributed.server_process.service import Service
from ormo_rpc.runtimes.distributed.server_process.serving import served
from ormo_rpc.server.parameter_server import ParameterServer
from ormo_rpc.storage.journal import Journal
from ormo_rpc.transports.base import Endpoint, Transport
from ormo_rpc.transports.shm import SharedMemory
from ormo_rpc.transports.stream.client import StreamClient, StreamWorkerSide
from ormo_rpc.transports.stream.server import StreamServerSide
from ormo_rpc.transports.stream.shared_memory import AVAILABLE, SharedMemoryPool
from ormo_rpc.transports.tcp import Tcp
from tests.support.buffers import averages
from tests.support.contract import same
from tests.support.processes import PATIENCE_SECONDS, wait_until
from tests.support.rendezvous import join_request, serving
from tests.support.schedule import normal

SECRET = Secret("a secret that only we two know")
LARGE = pool.WORTH_POOLING // 4 + 1
"""Elements of float32 from which snapshots lie in pools, and so in shared memory; odd."""
SMALL = 5
WORKERS = 3
SHARED, TCP = SharedMemory(), Tcp()
BOTH = [
    pytest.param(SHARED, id="shared", marks=pytest.mark.skipif(not AVAILABLE, reason="no memfd_create")),
    pytest.param(TCP, id="tcp"),
]


class StreamWorker:
    """A worker: its lease, its connection, and a thread that waits for its replies."""

    def __init__(self, cluster: Cluster, number: int, transport: Transport) -> None:
        self.number = number
        self.elsewhere = ThreadPoolExecutor(1)
        self._membership = ExitStack()
        membership = self._membership.enter_context(
            joined(cluster.address, SECRET, join_request(number), timeout_seconds=PATIENCE_SECONDS)
        )
        self.lease = membership.lease
        side = transport.worker_side()
        assert isinstance(side, StreamWorkerSide)
        self.pool = side.pool
        form = cluster.service.push_format
        self.payload = side.allocate(form.size).view(form.pushed_dtype)
        self.endpoint = Endpoint(
            lease=membership.lease,
            control=membership.control,
            joined=membership.response,
            transport=cluster.transport,
            secret=SECRET,
            timeout_seconds=PATIENCE_SECONDS,
        )
        self._connection = ExitStack()
        try:
            client = self._connection.enter_context(side.connect(self.endpoint, self.payload))
        except BaseException:
            self._membership.close()
            raise
        assert isinstance(client, StreamClient)
        self.client = client

    def register(self) -> Future[Reply]:
        """Register; the reply comes when all have."""
        return self.elsewhere.submit(self.client.register)

    def push(self, reply: Reply, payload: Tensor, **other: Any) -> Future[Reply]:
        """Push for a reply."""
        assert reply.ticket is not None
        numbers: dict[str, Any] = {
            "worker": self.number,
            "ticket": reply.ticket,
            "stamp": reply.stamp,
            "incarnation": reply.incarnation,
            "loss": 0.5,
            "samples": 8,
        }
        self.payload.copy_(payload)
        push = Push(grad=self.payload, **{**numbers, **other})
        return self.elsewhere.submit(self.client.push, push)

    def close(self) -> None:
        """Close lease and connection, as the end of a process does."""
        self._membership.close()
        self._connection.close()
        self.elsewhere.shutdown()


FACTS = ("worker", "ticket", "stamp", "lr", "steps", "incarnation")


class Cluster:
    """A service behind a listener, and a reference server, in process, that gets the same pushes (rounded ones widened)."""

    def __init__(
        self,
        listener: Listener,
        transport: str,
        service: Service,
        reference: ParameterServer,
        pool: SharedMemoryPool | None,
    ) -> None:
        self.listener = listener
        self.address: tuple[str, int] = listener.sock.getsockname()[:2]
        self.transport = transport
        self.service = service
        self.server = service.server
        self.reference = reference
        self.pool = pool
        self.workers: list[StreamWorker] = []
        self.held: dict[int, tuple[Reply, Reply]] = {}
        """The reply that each worker has: the one that crossed, and the reference's."""
        self.waiting: dict[int, Future[Reply]] = {}
        self.pushed = 0

    def start(self, *transports: Transport) -> Cluster:
        """Connect workers, and take the first replies."""
        for number, transport in enumerate(transports):
            self.workers.append(StreamWorker(self, number, transport))
        self.waiting = {worker.number: worker.register() for worker in self.workers}
        self.take(self.reference.start())
        return self

    def step(self, worker: int) -> None:
        """Let a worker push; those that the reference replies to get a reply, with the same bits, and no others."""
        came, expected = self.held.pop(worker)
        assert came.ticket is not None
        payload = self.gradient(came.ticket)
        self.waiting[worker] = self.workers[worker].push(came, payload)
        grad, buffers = self.service.push_format.unpack(payload.view(torch.uint8))
        replies = self.reference.receive(
            Push(
                worker=worker,
                ticket=came.ticket,
                stamp=came.stamp,
                grad=grad.to(self.reference.params.dtype),
                buffers=buffers,
                loss=0.5,
                samples=8,
                incarnation=came.incarnation,
            )
        )
        self.pushed += 1
        applied: int = self.reference.iteration
        wait_until(lambda: applied <= self.server.iteration, "the update", every_seconds=0.001)
        self.take(replies)
        for mine, reference in self.held.values():
            assert torch.equal(mine.params, reference.params), "a reply has changed after it was issued"
        assert expected.stamp == came.stamp

    def take(self, replies: list[Reply]) -> None:
        """Take the replies that are due."""
        for expected in replies:
            came = self.waiting.pop(expected.worker).result(PATIENCE_SECONDS)
            assert [getattr(came, name) for name in FACTS] == [getattr(expected, name) for name in FACTS]
            if expected.ticket is not None:
                assert came.params.dtype == expected.params.dtype
                assert torch.equal(came.params, expected.params)
                self.held[expected.worker] = (came, expected)
        assert not [worker for worker, future in self.waiting.items() if future.done()]

    def gradient(self, ticket: int) -> Tensor:
        """The push for a ticket."""
        dtype = self.service.push_format.pushed_dtype
        return 0.1 * normal(self.service.push_format.size // dtype.itemsize, 3, ticket).to(dtype)

    def run(self, steps: int, rng: random.Random, among: tuple[int, ...] = tuple(range(WORKERS))) -> None:
        """Let workers that have work push, in any order."""
        for _ in range(steps):
            able = sorted(worker for worker in self.held if worker in among)
            if not able:
                return
            self.step(rng.choice(able))

    def check_same_state(self) -> None:
        """Assert that server and reference have the same state."""
        with self.service.lock:
            assert same(self.server.state_dict(replies=True), self.reference.state_dict(replies=True))


@contextmanager
def cluster(
    transport: Transport = SHARED,
    *,
    dimension: int = LARGE,
    dtype: torch.dtype = torch.float32,
    workers: int = WORKERS,
    buffers: bool = False,
    wire: WireDtype = WireDtype.float32,
    max_not_finite: int = 10,
    journal: Journal | None = None,
    **options: Any,
) -> Generator[Cluster]:
    """Serve; with a ``wire`` that rounds, parameters are sent in bfloat16, and there are no ``buffers``."""
    given: dict[str, Any] = {
        "algorithm": "ormo",
        "lr": lambda t: 0.01 / (1 + t),
        "momentum": 0.9,
        "params": normal(dimension, 7, 0).to(dtype),
        "sent_dtype": None if wire.rounded is None else torch.bfloat16,
        **options,
    }

    def server(pushed: torch.dtype | None = None) -> ParameterServer:
        average = averages({"mean": torch.zeros(2, dtype=dtype)}, {"mean": 0.25}) if buffers else None
        return build_server(num_workers=workers, buffers=average, pushed_dtype=pushed, **given)

    reference, ours = server(), server(wire.rounded)
    form = PushFormat(
        params=Layout({"params": ours.params}),
        buffers=ours.buffers.layout,
        dtype=dtype,
        vectors=ours.algorithm.VECTORS_PUSHED,
        wire=wire,
    )
    side = transport.server_side()
    assert isinstance(side, StreamServerSide)
    if side.memory is not None:
        ours.algorithm.kernel = replace(ours.algorithm.kernel, empty=pool.pooled(side.memory))
    ours.snapshots.reserve(ours.num_workers)
    service = Service(ours, lambda _: None, max_not_finite=max_not_finite, journal=journal, push_format=form)
    with ExitStack() as stack:
        sock = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        stack.callback(sock.shutdown, socket.SHUT_RDWR)  # wakes the thread that accepts
        listener = stack.enter_context(served(sock, SECRET, service, side, serving(transport.name)))
        cluster = Cluster(listener, transport.name, service, reference, side.pool)
        try:
            yield cluster
        finally:
            for worker in cluster.workers:
                worker.close()


def mapping(vector: Tensor) -> str:
    """The line of the system's map of this process's memory in which a vector lies."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(each, 16) for each in line.split()[0].split("-"))
        if begin <= vector.data_ptr() < end:
            return line
    raise AssertionError("the vector is in no mapping")
