"""Measure the round trip of a push between two processes on one GPU, by path and size: ``python -m benchmarks.gpu_paths``.

The worker makes a gradient on the GPU, and wants the parameters of the reply there; the server has its parameters there, and
makes a step. Each of the two takes one small kernel, for which the GPU changes from one process to the other. Median, lowest
and highest of the round trips of one connection.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import statistics
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import exit_on_sigterm
from ormo_rpc.compression import PushFormat
from ormo_rpc.control.joining import joined
from ormo_rpc.control.memberships import Membership, Memberships
from ormo_rpc.control.messages import JoinRequest
from ormo_rpc.kernels.page_locked import lock, zeros
from ormo_rpc.messages import Push, Reply
from ormo_rpc.models.flat import Layout
from ormo_rpc.options import parts
from ormo_rpc.rendezvous.secret import Secret
from ormo_rpc.report.table import as_markdown as table
from ormo_rpc.runtimes.distributed.server_process.serving import Serving, served
from ormo_rpc.server.buffer_layout import BufferLayout
from ormo_rpc.transports.base import Endpoint, ReplySize, ServerSide, Transport
from ormo_rpc.transports.pending_replies import ReplyFuture

SIZES = (1, 272_474, 2_000_000, 25_000_000)
"""One parameter: what a round trip takes without its bytes."""
SECONDS = 0.7
"""The time of the round trips of one path and size; at least `LEAST` of them are made."""
LEAST = 5
WARM_UP = 3
TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class PathToTry:
    """A path.

    Attributes:
        transport: The name of the transport.
        page_locked: The CPU's memory, where it goes through that, is page-locked.
    """

    transport: str
    page_locked: bool = True


PATHS: Mapping[str, PathToTry] = {
    "cuda_ipc": PathToTry(transport="cuda_ipc"),
    "shm, page-locked": PathToTry(transport="shm"),
    "shm": PathToTry(transport="shm", page_locked=False),
    "gloo": PathToTry(transport="gloo"),
    "tcp": PathToTry(transport="tcp"),
    "rpc": PathToTry(transport="rpc"),
}


class EchoService:
    """Takes pushes to the GPU, and replies with parameters that lie there; also the handler of its one membership.

    Args:
        dimension: D.
        device: Of the parameters.
        side: The server's half of the transport, whose memory replies are copied to.
        page_locked: That memory is page-locked.
    """

    def __init__(self, dimension: int, device: torch.device, side: ServerSide, *, page_locked: bool) -> None:
        self.push_format = PushFormat(
            params=Layout({"params": torch.empty(dimension)}), buffers=BufferLayout({}), dtype=torch.float32
        )
        self.reply_size = ReplySize(params=4 * dimension, buffers=0)
        self.rereads_pushes = False
        self.device = device
        self.memberships = Memberships(1)
        self.path = ""
        self._initial = torch.arange(dimension, dtype=torch.float32, device=device)
        self._params = self._initial.clone()
        self._grad = torch.zeros(dimension, device=device)
        self._on_host = self._host_memory(4 * dimension, side, page_locked=page_locked and device.type == "cuda")

    def _host_memory(self, size: int, side: ServerSide, *, page_locked: bool) -> torch.Tensor:
        if side.memory is None:
            return zeros(size, page_locked=page_locked).view(torch.float32)
        self._mapped = side.memory(size)
        memory = torch.frombuffer(self._mapped, dtype=torch.uint8)
        return (lock(memory) if page_locked else memory)[:size].view(torch.float32)

    def join(self, request: JoinRequest) -> Membership:
        """Let the worker join."""
        return self.memberships.add(request.preferred_worker, request.pid, request.host, request.slot_id)

    def evict(self, membership: Membership, reason: str) -> None:
        """End the membership."""
        del reason
        if membership.session_id in self.memberships.by_session:
            self.memberships.remove(membership)

    def request_leave(self, membership: Membership) -> None:
        """Nobody asks for it."""

    def is_member(self, session_id: str) -> bool:
        """Tell whether a session is valid."""
        return session_id in self.memberships.by_session

    def connected(self, session_id: str, transport: str, reason: str) -> None:
        """Take note of the path."""
        del session_id, reason
        self.path = transport

    def register(self, session_id: str) -> ReplyFuture:
        """Reply at once."""
        del session_id
        return self._replied(0)

    def push(self, session_id: str, push: Push) -> ReplyFuture:
        """Make a step, and reply at once."""
        del session_id
        grad = push.grad
        if grad.device != self.device:
            grad = self._grad.copy_(grad, non_blocking=True)
        torch.add(self._initial, grad, out=self._params)
        return self._replied(push.ticket + 1)

    def on_host(self, reply: Reply) -> Reply:
        """Copy the parameters to the CPU."""
        self._on_host.copy_(reply.params)
        return replace(reply, params=self._on_host)

    def leave(self, session_id: str) -> None:
        """End the membership."""
        self.evict(self.memberships.by_session[session_id], "")

    def _replied(self, ticket: int) -> ReplyFuture:
        future = ReplyFuture()
        future.set_result(Reply(worker=0, ticket=ticket, stamp=0, params=self._params, lr=0.1, steps=1, incarnation=0))
        return future


def measure(pipe: Connection, name: str, dimension: int, device: torch.device) -> dict[str, Any]:
    """Serve one connection of the worker at the other end of the pipe; return the row."""
    path = PATHS[name]
    cls: type[Transport] = parts("transport")[path.transport]
    row = {"path": name, "parameters": dimension}
    if reason := cls.unavailable():
        return {**row, "reason": reason}
    side = cls().server_side()
    service = EchoService(dimension, device, side, page_locked=path.page_locked)
    secret = os.urandom(16).hex()
    what = Serving(
        transport=path.transport,
        control="rpc" if cls.NEEDS_RPC else "socket",
        config="",
        fingerprint={},
        heartbeat_seconds=1.0,
        worker_timeout_seconds=TIMEOUT_SECONDS,
        call_timeout_seconds=TIMEOUT_SECONDS,
    )
    with ExitStack() as stack:
        sock = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        stack.callback(sock.shutdown, socket.SHUT_RDWR)  # wakes the thread that accepts
        stack.enter_context(served(sock, Secret(secret), service, side, what))
        pipe.send((name, dimension, sock.getsockname()[:2], secret, str(device)))
        if not pipe.poll(4 * TIMEOUT_SECONDS):
            raise TimeoutError("the worker does not answer")
        seconds = pipe.recv()
    if isinstance(seconds, str):
        return {**row, "reason": seconds}
    median = statistics.median(seconds)
    return {
        **row,
        "milliseconds": 1e3 * median,
        "lowest": 1e3 * min(seconds),
        "highest": 1e3 * max(seconds),
        "round_trips": len(seconds),
        "gigabytes_per_second": 8e-9 * dimension / median,
        "connected_by": service.path,
    }


def work(pipe: Connection) -> None:
    """Measure round trips, for each connection that the server offers, to the end of the pipe."""
    torch.set_num_threads(1)
    while (offered := pipe.recv()) is not None:
        name, dimension, address, secret, device = offered
        try:
            pipe.send(round_trips(PATHS[name], dimension, address, Secret(secret), torch.device(device)))
        except Exception as error:  # the other paths are measured all the same
            pipe.send(f"{type(error).__name__}: {error}")


def round_trips(path: PathToTry, dimension: int, address: tuple[str, int], secret: Secret, device: torch.device) -> list[float]:
    """Seconds of each round trip."""
    transport: Transport = parts("transport")[path.transport]()
    side = transport.worker_side()
    on_gpu = device.type == "cuda"
    side.page_locked = on_gpu and path.page_locked
    side.gpu = device if on_gpu and path.transport == "cuda_ipc" else None
    payload = side.allocate(4 * dimension)
    stays = on_gpu and payload.device == device
    grad = payload.view(torch.float32) if stays else torch.zeros(dimension, device=device)
    params = torch.zeros(dimension, device=device)
    request = JoinRequest(preferred_worker=0, pid=os.getpid(), host=socket.gethostname(), slot_id="")
    with joined(address, secret, request, timeout_seconds=TIMEOUT_SECONDS) as membership:
        endpoint = Endpoint(
            lease=membership.lease,
            control=membership.control,
            joined=membership.response,
            transport=transport.name,
            secret=secret,
            timeout_seconds=TIMEOUT_SECONDS,
        )
        with side.connect(endpoint, payload) as client:
            reply = client.register()

            def once() -> None:
                nonlocal reply
                assert reply.ticket is not None
                grad.fill_(1.0)
                if not stays:
                    payload.copy_(grad.view(torch.uint8))
                reply = client.push(Push(worker=0, ticket=reply.ticket, stamp=0, grad=payload.view(torch.float32)))
                if not stays:
                    params.copy_(reply.params, non_blocking=True)
                if on_gpu:
                    torch.cuda.synchronize(device)

            seconds = timed(once)
            came, expected = reply.params if stays else params, torch.arange(dimension, dtype=torch.float32).add_(1.0)
            assert torch.equal(came.cpu(), expected), "the parameters are not the initial ones and the worker's gradient"
            client.leave()
            return seconds


def timed(once: Callable[[], None]) -> list[float]:
    """Seconds of each call, after those that warm up."""
    for _ in range(WARM_UP):
        once()
    seconds, began = list[float](), time.perf_counter()
    while len(seconds) < LEAST or time.perf_counter() - began < SECONDS:
        start = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - start)
    return seconds


def as_markdown(result: Mapping[str, Any]) -> str:
    """The table of a result."""
    rows: list[tuple[str, ...]] = [("path", "parameters", "ms: median (lowest - highest)", "GB/s", "round trips")]
    for row in result["rows"]:
        start = (row["path"], f"{row['parameters']:,}")
        if "reason" in row:
            rows.append((*start, f"not measured: {row['reason']}", "", ""))
            continue
        spread = f"{row['milliseconds']:.3f} ({row['lowest']:.3f} - {row['highest']:.3f})"
        rows.append((*start, spread, f"{row['gigabytes_per_second']:.2f}", str(row["round_trips"])))
    return (
        "From a gradient on the GPU to parameters there, by a server in another process on the same GPU, which makes a step: "
        f"one small kernel in each process; bytes of both ways.\n\n{table(rows)}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write the result."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, nargs="+", default=SIZES, metavar="D")
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=tuple(PATHS), metavar="PATH")
    parser.add_argument("--device", default="cuda:0", help="cpu: to try the command where there is no GPU")
    parser.add_argument("--into", type=Path, metavar="FILE", help="write the result as JSON")
    a = parser.parse_args(argv)
    exit_on_sigterm()
    torch.set_num_threads(1)
    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe()
    process = context.Process(target=work, args=(end,), daemon=True)
    process.start()
    end.close()
    result: dict[str, Any] = {"device": a.device, "rows": []}
    try:
        for dimension in a.parameters:
            for name in a.paths:
                result["rows"].append(measure(pipe, name, dimension, torch.device(a.device)))
                print(result["rows"][-1], file=sys.stderr, flush=True)
                if a.into is not None:  # at once: whoever ends this command keeps what is done
                    a.into.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        pipe.send(None)
        process.join(TIMEOUT_SECONDS)
    finally:
        process.kill()
        process.join()
    print(as_markdown(result))


if __name__ == "__main__":
    main()
