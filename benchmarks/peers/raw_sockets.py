"""TCP sockets and buffers made once: the least that can be written by hand, and the baseline of the comparison."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Generator
from typing import Any

import torch

from benchmarks.peers.harness import HOST, RoundTrip, Step, bytes_of, main, sockets
from benchmarks.peers.measurement import Job


def server(job: Job, publish: Callable[[Any], None]) -> None:
    """Serve each worker in a thread: receive, step and copy under the lock, send."""
    step = Step(job.parameters)

    def serve(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        grad, reply = torch.zeros(job.parameters), torch.zeros(job.parameters)
        into, out = bytes_of(grad), bytes_of(reply)
        while receive(connection, into):
            step(grad, reply)
            connection.sendall(out)

    with socket.create_server((HOST, 0), backlog=job.workers) as listener:
        publish(listener.getsockname())
        while True:
            threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()


@contextlib.contextmanager
def worker(job: Job, number: int, address: Any) -> Generator[RoundTrip]:  # noqa: ARG001 - all workers are alike
    """Send the gradient, receive the parameters."""
    grad, params = torch.randn(job.parameters), torch.zeros(job.parameters)
    out, into = bytes_of(grad), bytes_of(params)
    with sockets(address) as connection:

        def round_trip() -> None:
            connection.sendall(out)
            if not receive(connection, into):
                raise ConnectionError("the server is gone")

        yield round_trip


def receive(connection: socket.socket, into: memoryview) -> bool:
    """Fill the buffer; False if the other side has closed."""
    done = 0
    while done < len(into):
        count = connection.recv_into(into[done:])
        if count == 0:
            return False
        done += count
    return True


if __name__ == "__main__":
    main("raw_sockets", server, worker)
