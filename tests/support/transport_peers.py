"""A server in this process and workers in processes of their own, connected by any transport."""

from __future__ import annotations

import multiprocessing
import socket
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from ormo_rpc.compression import PushFormat
from ormo_rpc.control.joining import joined
from ormo_rpc.control.memberships import Membership, Memberships
from ormo_rpc.control.messages import JoinRequest
from ormo_rpc.errors import BY_NAME, Refused, ServerLost
from ormo_rpc.messages import Push, Reply, number_fields
from ormo_rpc.models.flat import Layout
from ormo_rpc.rendezvous.secret import Secret
from ormo_rpc.runtimes.distributed.server_process.serving import served
from ormo_rpc.server.buffer_layout import BufferLayout
from ormo_rpc.transports.base import Endpoint, ReplySize, ServerSide, Transport
from ormo_rpc.transports.pending_replies import ReplyFuture
from tests.support.processes import PATIENCE_SECONDS
from tests.support.rendezvous import join_request, serving

SECRET_TEXT = "a secret that only we two know"  # noqa: S105 - of these tests
STATISTICS = 2
"""Batch-norm statistics behind each push."""
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["ormo_rpc.transports.auto", "ormo_rpc.transports.gloo.client", "ormo_rpc.transports.rpc.client"]
)


class RecordingService:
    """Records the calls of a transport, and gives the replies that a test has set; also the handler of its memberships.

    Args:
        dimension: D of the pushes, of float32.
    """

    def __init__(self, dimension: int) -> None:
        self.push_format = PushFormat(
            params=Layout({"params": torch.empty(dimension)}),
            buffers=BufferLayout({"mean": torch.empty(STATISTICS)}),
            dtype=torch.float32,
        )
        self.reply_size = ReplySize(params=4 * dimension, buffers=100_000)
        self.rereads_pushes = False
        self.device = torch.device("cpu")
        self.transports: dict[str, tuple[str, str]] = {}
        """Transport and reason by session."""
        self.memberships = Memberships(8)
        self.registered: list[str] = []
        self.left: list[str] = []
        self.evicted: list[str] = []
        """Reasons."""
        self.pushes: list[Push] = []
        self.replies: list[Reply] = []
        """The replies to the next calls, in order; without one, the future stays open."""
        self.open: list[ReplyFuture] = []
        self.on_ended: Callable[[str], None] = lambda _: None

    def join(self, request: JoinRequest) -> Membership:
        """Let every process join."""
        return self.memberships.add(request.preferred_worker, request.pid, request.host, request.slot_id)

    def evict(self, membership: Membership, reason: str) -> None:
        """End a membership."""
        if membership.session_id in self.memberships.by_session:
            self.memberships.remove(membership)
            self.evicted.append(reason)
            self.on_ended(membership.session_id)

    def request_leave(self, membership: Membership) -> None:
        """No worker of these tests asks for it."""

    def is_member(self, session_id: str) -> bool:
        """Tell whether a session is valid."""
        return session_id in self.memberships.by_session

    def on_host(self, reply: Reply) -> Reply:
        """Return the reply, whose tensors are on the CPU."""
        return reply

    def connected(self, session_id: str, transport: str, reason: str) -> None:
        """Take note of it."""
        self.transports[session_id] = (transport, reason)

    def register(self, session_id: str) -> ReplyFuture:
        """Take note of it."""
        self.registered.append(session_id)
        return self._reply()

    def push(self, session_id: str, push: Push) -> ReplyFuture:
        """Take note of a copy, on the CPU."""
        buffers = {name: each.cpu().clone() for name, each in push.buffers.items()}
        numbers = {name: getattr(push, name) for name in push.__slots__ if name not in ("grad", "buffers")}
        self.pushes.append(Push(**numbers, grad=push.grad.cpu().clone(), buffers=buffers))
        return self._reply()

    def leave(self, session_id: str) -> None:
        """End a membership."""
        self.left.append(session_id)
        self.memberships.remove(self.memberships.by_session[session_id])
        self.on_ended(session_id)

    def _reply(self) -> ReplyFuture:
        future = ReplyFuture()
        if self.replies:
            future.set_result(self.replies.pop(0))
        else:
            self.open.append(future)
        return future


class Worker:
    """A worker in another process, which makes one call at a time; a process may have several.

    Args:
        process: Its process.
        pipe: To its thread there.
        address: Of the server.
        worker: Its number.
    """

    def __init__(self, process: Any, pipe: Connection, address: tuple[str, int], worker: int) -> None:
        self.process = process
        self.address = address
        self.worker = worker
        self.session_id = ""
        self._pipe = pipe

    def connect(self) -> str:
        """Wait until it is connected; return its session."""
        self.session_id = self.result()
        return self.session_id

    def register(self) -> None:
        """Begin to register; `result` is the reply."""
        self._pipe.send(("register", {}, b""))

    def push(self, numbers: Mapping[str, Any], payload: Tensor) -> None:
        """Begin to push; `result` is the reply."""
        self._pipe.send(("push", dict(numbers), payload.view(torch.uint8).numpy().tobytes()))

    def leave(self) -> None:
        """Begin to leave; `result` is None."""
        self._pipe.send(("leave", {}, b""))

    def connect_again(self) -> None:
        """Begin to close membership and connection, and to join again; `result` is the session."""
        self._pipe.send(("connect", {}, b""))

    def done(self, timeout_seconds: float = 0.0) -> bool:
        """Tell whether there is a result."""
        return self._pipe.poll(timeout_seconds)

    def result(self) -> Any:
        """Wait for the result of the call.

        Raises:
            PushRefused, Refused, ServerLost, TimeoutError: as the call did.
        """
        assert self._pipe.poll(PATIENCE_SECONDS), f"worker {self.worker} does not answer"
        kind, value, rest = self._pipe.recv()
        if kind == "error":
            raise {**BY_NAME, "Refused": Refused, "ServerLost": ServerLost}[value](rest)
        if kind == "reply":
            return Reply(**value, params=_tensor(*rest["params"]), buffers=_tensor(*rest["buffers"]))
        return value

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()
        self._pipe.close()


def started(transport: Transport, address: tuple[str, int], workers: Sequence[int], size: int) -> list[Worker]:
    """Start a process with workers, which begin to connect.

    Args:
        transport: How they are connected.
        address: Of the server.
        workers: Their numbers.
        size: Bytes of their pushes.
    """
    pipes = [_context.Pipe() for _ in workers]
    ends = [end for _, end in pipes]
    process = _context.Process(target=_work_all, args=(ends, transport, address, workers, size), daemon=True)
    process.start()
    for end in ends:
        end.close()
    return [Worker(process, pipe, address, worker) for worker, (pipe, _) in zip(workers, pipes, strict=True)]


def _work_all(
    pipes: list[Connection], transport: Transport, address: tuple[str, int], workers: Sequence[int], size: int
) -> None:
    """Run each worker in a thread of its own."""
    torch.set_num_threads(1)
    threads = [
        threading.Thread(target=_work, args=(pipe, transport, address, worker, size))
        for worker, pipe in zip(workers, pipes, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _work(pipe: Connection, transport: Transport, address: tuple[str, int], worker: int, size: int) -> None:
    """Make the calls that come through a pipe, to its end."""
    side = transport.worker_side()
    payload = side.allocate(size)
    secret = Secret(SECRET_TEXT)
    while True:
        with joined(address, secret, join_request(worker), timeout_seconds=PATIENCE_SECONDS) as membership:
            endpoint = Endpoint(
                lease=membership.lease,
                control=membership.control,
                joined=membership.response,
                transport=transport.name,
                secret=secret,
                timeout_seconds=PATIENCE_SECONDS,
            )
            try:
                with side.connect(endpoint, payload) as client:
                    pipe.send(("value", endpoint.session_id, None))
                    while (call := pipe.recv())[0] != "connect":
                        pipe.send(_called(client, payload, *call))
            except Refused as error:
                pipe.send(("error", "Refused", str(error)))
                return


def _called(client: Any, payload: Tensor, kind: str, numbers: dict[str, Any], data: bytes) -> tuple[str, Any, Any]:
    try:
        if kind == "push":
            payload.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        reply = client.push(Push(**numbers, grad=payload)) if kind == "push" else getattr(client, kind)()
    except (*BY_NAME.values(), ServerLost) as error:
        return "error", type(error).__name__, str(error)
    if reply is None:
        return "value", None, None
    numbers = {field.name: getattr(reply, field.name) for field in number_fields(Reply)}
    tensors = {"params": reply.params, "buffers": reply.buffers}
    sent = {name: (each.dtype, each.cpu().view(torch.uint8).numpy().tobytes()) for name, each in tensors.items()}
    return "reply", numbers, sent


def _tensor(dtype: torch.dtype, data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


@contextmanager
def serving_workers(
    transport: Transport, make_service: Callable[[ServerSide], Any]
) -> Generator[tuple[Any, tuple[str, int], Callable[[], None]]]:
    """Serve.

    Args:
        transport: How workers are connected.
        make_service: Makes the service, which also handles memberships; given the server's half, whose memory it may use.

    Yields:
        The service, its address, and a function that ends the server.
    """
    side = transport.server_side()
    service = make_service(side)
    service.on_ended = side.session_ended
    control = "socket" if transport.AVOIDS_RPC else "rpc"
    with ExitStack() as stack, ExitStack() as ending:
        sock = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        what = serving(transport.name, control=control, call_timeout_seconds=2.0)
        ending.enter_context(served(sock, Secret(SECRET_TEXT), service, side, what))
        ending.callback(sock.shutdown, socket.SHUT_RDWR)  # wakes the thread that accepts
        yield service, sock.getsockname()[:2], ending.close


@contextmanager
def connected(
    transport: Transport, make_service: Callable[[ServerSide], Any], workers: int = 1, *, processes: int | None = None
) -> Generator[tuple[Any, list[Worker], Callable[[], None]]]:
    """Serve, and connect workers.

    Args:
        transport: How they are connected.
        make_service: See `serving_workers`.
        workers: Their number.
        processes: Those among which they are distributed; by default each has its own.

    Yields:
        The service, the workers, and a function that ends the server.
    """
    with serving_workers(transport, make_service) as (service, address, end_server):
        made: list[Worker] = []
        try:
            for first in range(processes or workers):
                numbers = range(first, workers, processes or workers)
                made += started(transport, address, numbers, service.push_format.size)
            for worker in made:
                worker.connect()
            yield service, sorted(made, key=lambda worker: worker.worker), end_server
        finally:
            for worker in made:
                worker.close()


@contextmanager
def server_process(transport: Transport, dimension: int) -> Generator[tuple[Any, tuple[str, int], Callable[[], int]]]:
    """A server in a process of its own, which gives no reply.

    Yields:
        The process, its address, and a function that returns the number of calls to register.
    """
    pipe, child_end = _context.Pipe()
    process = _context.Process(target=_serve, args=(child_end, transport, dimension), daemon=True)
    process.start()
    child_end.close()

    def received() -> Any:
        assert pipe.poll(PATIENCE_SECONDS), "the server does not answer"
        return pipe.recv()

    def registered() -> int:
        pipe.send(None)
        return received()

    try:
        yield process, received(), registered
    finally:
        process.kill()
        process.join()
        pipe.close()


def _serve(pipe: Connection, transport: Transport, dimension: int) -> None:
    torch.set_num_threads(1)
    with serving_workers(transport, lambda _: RecordingService(dimension)) as (service, address, _):
        pipe.send(address)
        while True:
            pipe.recv()
            pipe.send(len(service.registered))
