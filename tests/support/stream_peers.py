"""A service behind a door, and workers with streams to it, beside a twin of the server in process."""

from __future__ import annotations

import random
import socket
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ormo_rpc import build_server
from ormo_rpc.compression import PushFormat
from ormo_rpc.compression.wire_options import Transport, WireDtype
from ormo_rpc.kernels import pool
from ormo_rpc.messages import Push, Reply
from ormo_rpc.models.flat import Layout
from ormo_rpc.rendezvous.lease import Lease, connect
from ormo_rpc.rendezvous.listener import Listener
from ormo_rpc.rendezvous.secret import Secret
from ormo_rpc.runtimes.distributed.server_process.service import Service
from ormo_rpc.server.buffers import RunningBuffers
from ormo_rpc.server.parameter_server import ParameterServer
from ormo_rpc.storage.journal import Journal
from ormo_rpc.transports.stream.client import StreamClient
from ormo_rpc.transports.stream.server import StreamServer, shared_snapshots
from ormo_rpc.transports.stream.shared_memory import AVAILABLE, SharedMemoryPool
from tests.support.contract import same
from tests.support.processes import PATIENCE_SECONDS, wait_until
from tests.support.rendezvous import join_response
from tests.support.schedule import normal

SECRET = Secret("a secret that only we two know")
LARGE = pool.WORTH_POOLING // 4 + 1
"""Elements of float32 from which snapshots lie in pools, and so in shared memory; odd."""
SMALL = 5
WORKERS = 3
SHARED, TCP = Transport.auto, Transport.tcp
BOTH = [pytest.param(SHARED, id="shared", marks=pytest.mark.skipif(not AVAILABLE, reason="no memfd_create")), TCP]


def plain_bytes(size: int) -> Tensor:
    """Memory that is not shared."""
    return torch.zeros(size, dtype=torch.uint8)


class Client:
    """A worker: its lease, its stream, and a thread that waits for its answers."""

    def __init__(self, house: House, number: int, transport: Transport) -> None:
        self.number = number
        self.elsewhere = ThreadPoolExecutor(1)
        self.lease: Lease = connect(
            house.address, SECRET, preferred_worker=number, slot_id="", timeout_seconds=PATIENCE_SECONDS
        )
        self.segments = None if transport is TCP else SharedMemoryPool()
        allocate = plain_bytes if self.segments is None else self.segments.vector
        self.payload = allocate(house.service.format.size).view(house.service.format.pushed_dtype)
        try:
            self.calls = StreamClient(
                self.lease,
                SECRET,
                self.payload,
                self.segments,
                must_share=transport is Transport.shm,
                timeout_seconds=PATIENCE_SECONDS,
            )
        except BaseException:
            self.lease.__exit__()
            raise

    def register(self) -> Future[Reply]:
        """Be ready; the answer comes when all are."""
        return self.elsewhere.submit(self.calls.register)

    def push(self, reply: Reply, payload: Tensor, **other: Any) -> Future[Reply]:
        """ServerResponse a reply."""
        assert reply.ticket is not None
        place: dict[str, Any] = {
            "ticket": reply.ticket,
            "stamp": reply.stamp,
            "incarnation": reply.incarnation,
            "loss": 0.5,
            "samples": 8,
        }
        self.payload.copy_(payload)
        push = Push(worker=self.number, grad=self.payload, **{**place, **other})
        return self.elsewhere.submit(self.calls.push, push, self.payload)

    def close(self) -> None:
        """Be gone."""
        self.lease.__exit__()
        self.calls.__exit__()
        self.elsewhere.shutdown()


FACTS = ("worker", "ticket", "stamp", "lr", "steps", "incarnation")


class House:
    """A service behind a door, and a twin of its server, in process, that gets the same pushes (rounded ones widened)."""

    def __init__(self, door: Listener, service: Service, twin: ParameterServer, segments: SharedMemoryPool | None) -> None:
        self.door = door
        self.address: tuple[str, int] = door.sock.getsockname()[:2]
        self.service = service
        self.server = service.server
        self.twin = twin
        self.segments = segments
        self.clients: list[Client] = []
        self.held: dict[int, tuple[Reply, Reply]] = {}
        """The reply that each worker has: what came by the stream, and what the twin says."""
        self.waiting: dict[int, Future[Reply]] = {}
        self.pushed = 0

    def enter(self, *transports: Transport) -> House:
        """Let workers in, start, and take the first replies."""
        for number, transport in enumerate(transports):
            self.clients.append(Client(self, number, transport))
        self.waiting = {client.number: client.register() for client in self.clients}
        self.take(self.twin.start())
        return self

    def step(self, worker: int) -> None:
        """A worker pushes what it holds; whoever the twin answers is answered, with the same bits, and nobody else."""
        came, expected = self.held.pop(worker)
        assert came.ticket is not None
        payload = self.gradient(came.ticket)
        self.waiting[worker] = self.clients[worker].push(came, payload)
        statistics = payload[payload.numel() - 2 :] if self.server.buffers.average else payload[:0]
        replies = self.twin.receive(
            Push(
                worker=worker,
                ticket=came.ticket,
                stamp=came.stamp,
                grad=payload[: payload.numel() - statistics.numel()].to(self.twin.params.dtype),
                buffers={"mean": statistics} if statistics.numel() else {},
                loss=0.5,
                samples=8,
                incarnation=came.incarnation,
            )
        )
        self.pushed += 1
        applied: int = self.twin.iteration
        wait_until(lambda: applied <= self.server.iteration, "the update", every_seconds=0.001)
        self.take(replies)
        for mine, twins in self.held.values():
            assert torch.equal(mine.params, twins.params), "a reply has changed after it was issued"
        assert expected.stamp == came.stamp

    def take(self, replies: list[Reply]) -> None:
        """Take the answers that are due."""
        for expected in replies:
            came = self.waiting.pop(expected.worker).result(PATIENCE_SECONDS)
            assert [getattr(came, name) for name in FACTS] == [getattr(expected, name) for name in FACTS]
            if expected.ticket is not None:
                assert came.params.dtype == expected.params.dtype
                assert torch.equal(came.params, expected.params)
                self.held[expected.worker] = (came, expected)
        assert not [worker for worker, future in self.waiting.items() if future.done()]

    def gradient(self, ticket: int) -> Tensor:
        """What is pushed for a ticket."""
        dtype = self.service.format.pushed_dtype
        return 0.1 * normal(self.service.format.size // dtype.itemsize, 3, ticket).to(dtype)

    def go_on(self, steps: int, chance: random.Random, among: tuple[int, ...] = tuple(range(WORKERS))) -> None:
        """That many pushes of workers that have work, in any order."""
        for _ in range(steps):
            able = sorted(worker for worker in self.held if worker in among)
            if not able:
                return
            self.step(chance.choice(able))

    def check_same_state(self) -> None:
        """The server and its twin are one as the other."""
        with self.service.lock:
            assert same(self.server.state_dict(replies=True), self.twin.state_dict(replies=True))


@contextmanager
def attach(
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
) -> Generator[House]:
    """A house; with a ``wire`` that rounds, what is handed out is rounded to bfloat16, and there are no ``buffers``."""
    given: dict[str, Any] = {
        "algorithm": "ormo",
        "lr": lambda t: 0.01 / (1 + t),
        "momentum": 0.9,
        "params": normal(dimension, 7, 0).to(dtype),
        "sent_dtype": None if wire.rounded is None else torch.bfloat16,
        **options,
    }

    def server(pushed: torch.dtype | None = None) -> ParameterServer:
        average = RunningBuffers({"mean": torch.zeros(2, dtype=dtype)}, {"mean": 0.25}) if buffers else None
        return build_server(num_workers=workers, buffers=average, pushed_dtype=pushed, **given)

    twin, ours = server(), server(wire.rounded)
    form = PushFormat(
        params=Layout({"params": ours.params}),
        buffers=Layout(ours.buffers.average),
        dtype=dtype,
        vectors=ours.algorithm.VECTORS_PUSHED,
        wire=wire,
    )
    segments = shared_snapshots(ours.algorithm, transport)
    ours.reserve(ours.num_workers)
    service = Service(ours, lambda _: None, max_not_finite=max_not_finite, journal=journal, push_format=form)
    serving = StreamServer(service, transport, segments)
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        stack.callback(listener.shutdown, socket.SHUT_RDWR)  # wakes the thread that accepts
        door = stack.enter_context(Listener(listener, SECRET, service, join_response(), PATIENCE_SECONDS, serving.serve))
        house = House(door, service, twin, segments)
        try:
            yield house
        finally:
            for client in house.clients:
                client.close()


def mapping(vector: Tensor) -> str:
    """The line of the system's map of our memory in which a vector lies."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(each, 16) for each in line.split()[0].split("-"))
        if begin <= vector.data_ptr() < end:
            return line
    raise AssertionError("it lies nowhere")
