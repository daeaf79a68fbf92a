"""A prototype of the wire between processes of one host, as one more contender of the throughput benchmark.

Gradients and snapshots lie in memory files (``memfd_create``) that both sides map; what crosses is a few numbers. A memory
file has no name: the other side opens it as ``/proc/PID/fd/N``. It is gone with the last process that holds it, however
that ends, so nothing can be left in ``/dev/shm``. The server writes new parameters straight into a slot that nobody holds;
a worker's next push says that it has done with the slot of its last reply.

``--control`` says how the few numbers cross: ``socket`` (Unix, one message each way), ``pipe`` (two of them), ``rpc``
(torch.distributed.rpc), ``tcp``. ``--threads`` is that of the step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import socket
import struct
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed.rpc as rpc
from torch import Tensor

from benchmarks.peers.common import LEARNING_RATE, MOMENTUM, Job, RoundTrip, free_port, measure
from benchmarks.peers.rpc_flat import join
from ormo_rpc.kernels.compiled import compiled_steps
from ormo_rpc.kernels.steps import TorchSteps
from ormo_rpc.kernels.threads import Threaded

CONTROLS = ("socket", "pipe", "tcp", "rpc")
MESSAGE = struct.Struct("<qqqd")
"""Worker, ticket, stamp or slot, loss: what a real push and reply have, by and large."""
TOKEN = 16


@dataclass(frozen=True)
class Segment:
    """Where a segment is: the process that made it, its descriptor there, and its vectors of D float32."""

    process: int
    descriptor: int
    vectors: int
    dimension: int

    @staticmethod
    def make(vectors: int, dimension: int) -> tuple[Segment, list[Tensor]]:
        """A new segment and its vectors; it lives as long as the descriptor or a mapping of it."""
        descriptor = os.memfd_create("ormo_rpc", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, vectors * stride(dimension))
        segment = Segment(os.getpid(), descriptor, vectors, dimension)
        return segment, segment.map(descriptor)

    def open(self) -> list[Tensor]:
        """The vectors, in another process."""
        descriptor = os.open(f"/proc/{self.process}/fd/{self.descriptor}", os.O_RDWR | os.O_CLOEXEC)
        try:
            return self.map(descriptor)
        finally:
            os.close(descriptor)

    def map(self, descriptor: int) -> list[Tensor]:
        """Map it, with all pages there, so that none is missing when the clock runs."""
        memory = mmap.mmap(descriptor, self.vectors * stride(self.dimension), flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        whole = torch.frombuffer(memory, dtype=torch.float32).view(self.vectors, -1)
        return [vector[: self.dimension] for vector in whole]


def stride(dimension: int) -> int:
    """Bytes from vector to vector: whole pages."""
    return -(-4 * dimension // mmap.PAGESIZE) * mmap.PAGESIZE


class Server:
    """The heart: check, step into a free slot, answer with its number."""

    def __init__(self, job: Job, threads: int, compiled: bool) -> None:
        self.segment, self.slots = Segment.make(job.workers + 2, job.parameters)
        self.steps = Threaded((compiled_steps() if compiled else None) or TorchSteps(), threads)
        self.u = torch.zeros(job.parameters)
        self.lock = threading.Lock()
        self.newest = 0
        self.held: dict[int, int] = {}
        self.grads: dict[int, Tensor] = {}

    def open(self, worker: int, segment: Segment) -> Segment:
        """A worker comes with its gradient's segment, and gets that of the snapshots."""
        self.grads[worker] = segment.open()[0]
        return self.segment

    def push(self, worker: int, ticket: int, stamp: int, loss: float) -> int:  # noqa: ARG002 - they only have to cross
        """Apply the gradient that lies in the worker's segment; return the slot of the new parameters."""
        grad = self.grads[worker]
        if not grad.sum().isfinite():
            raise ValueError("not finite")
        with self.lock:
            self.held.pop(worker, None)
            taken = {self.newest, *self.held.values()}
            slot = next(slot for slot in range(len(self.slots)) if slot not in taken)
            new, old = self.slots[slot], self.slots[self.newest]
            self.steps.ordered(
                grad, self.u, old, new, scale=1.0, shifts=1, beta=MOMENTUM, into_u=LEARNING_RATE, into_w=LEARNING_RATE
            )
            self.newest = self.held[worker] = slot
        return slot


_server: Server | None = None


def remote_open(worker: int, segment: Segment) -> Segment:
    """Called by RPC."""
    assert _server is not None
    return _server.open(worker, segment)


def remote_push(worker: int, ticket: int, stamp: int, loss: float) -> int:
    """Called by RPC."""
    assert _server is not None
    return _server.push(worker, ticket, stamp, loss)


class Contender:
    """A server and a worker with one kind of control.

    Args:
        control: See the module.
        threads: See the module.
        compiled: Whether the step is the compiled one.
    """

    def __init__(self, control: str, threads: int, compiled: bool) -> None:
        self.control, self.threads, self.compiled = control, threads, compiled

    def server(self, job: Job, publish: Callable[[Any], None]) -> None:
        """Serve for ever."""
        global _server  # what a worker calls by name finds it so
        _server = Server(job, self.threads, self.compiled)
        if self.control == "rpc":
            port = free_port()
            publish(port)
            join(job, 0, port)
            threading.Event().wait()
        tcp = self.control == "tcp"
        with socket.socket(
            socket.AF_INET if tcp else socket.AF_UNIX, socket.SOCK_STREAM if tcp else socket.SOCK_SEQPACKET
        ) as listener:
            listener.bind(("127.0.0.1", 0) if tcp else f"\0ormo_rpc benchmark {os.getpid()}")
            listener.listen(job.workers)
            publish(listener.getsockname())
            while True:
                connection = listener.accept()[0]
                threading.Thread(target=self._attend, args=(_server, connection), daemon=True).start()

    def _attend(self, server: Server, connection: socket.socket) -> None:
        if self.control == "tcp":
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        greeting = json.loads(connection.recv(4096))
        mine = server.open(greeting["worker"], Segment(**greeting["segment"]))
        answer: dict[str, Any] = {"segment": mine.__dict__}
        receive, send = lambda: connection.recv(MESSAGE.size), connection.send
        if self.control == "pipe":
            (request, to_us), (from_us, reply) = os.pipe(), os.pipe()
            answer["pipes"] = (os.getpid(), to_us, from_us)
            receive, send = lambda: os.read(request, MESSAGE.size), lambda data: os.write(reply, data)  # pyright: ignore[reportUnknownLambdaType]
        connection.send(json.dumps(answer).encode())
        while data := receive():
            worker, ticket, stamp, loss = MESSAGE.unpack(data)
            send(MESSAGE.pack(worker, ticket + 1, server.push(worker, ticket, stamp, loss), 0.0))

    @contextlib.contextmanager
    def worker(self, job: Job, number: int, address: Any) -> Generator[RoundTrip]:
        """Say where the gradient is, and find the parameters where the answer says."""
        segment, (grad,) = Segment.make(1, job.parameters)
        grad.normal_()
        if self.control == "rpc":
            join(job, number + 1, address)
            slots = rpc.rpc_sync("rank0", remote_open, args=(number, segment)).open()

            def by_rpc() -> None:
                slots[rpc.rpc_sync("rank0", remote_push, args=(number, 0, 0, 0.0))]

            yield by_rpc
            return
        tcp = self.control == "tcp"
        with socket.socket(
            socket.AF_INET if tcp else socket.AF_UNIX, socket.SOCK_STREAM if tcp else socket.SOCK_SEQPACKET
        ) as connection:
            connection.connect(address)
            if tcp:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.send(json.dumps({"worker": number, "segment": segment.__dict__}).encode())
            answer = json.loads(connection.recv(4096))
            slots = Segment(**answer["segment"]).open()
            receive, send = lambda: connection.recv(MESSAGE.size), connection.send
            if self.control == "pipe":
                process, to_server, from_server = answer["pipes"]
                out = os.open(f"/proc/{process}/fd/{to_server}", os.O_WRONLY)
                into = os.open(f"/proc/{process}/fd/{from_server}", os.O_RDONLY)
                receive, send = lambda: os.read(into, MESSAGE.size), lambda data: os.write(out, data)  # pyright: ignore[reportUnknownLambdaType]

            def round_trip() -> None:
                send(MESSAGE.pack(number, 0, 0, 0.0))
                slots[MESSAGE.unpack(receive())[2]]

            yield round_trip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=272_474, metavar="D")
    parser.add_argument("--workers", type=int, default=2, metavar="K")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S")
    parser.add_argument("--control", choices=CONTROLS, default="socket")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--torch", action="store_true", help="the step in torch, not in C")
    a = parser.parse_args()
    job = Job(parameters=a.parameters, workers=a.workers, seconds=a.seconds)
    contender = Contender(a.control, a.threads, not a.torch)
    name = f"one_host_{a.control}{'_torch' if a.torch else ''}{f'_{a.threads}_threads' if a.threads > 1 else ''}"
    print(json.dumps(measure(name, job, contender.server, contender.worker)), flush=True)


if __name__ == "__main__":
    main()
