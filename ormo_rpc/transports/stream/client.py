"""The worker's half of the stream transports."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from typing_extensions import override

from ormo_rpc.errors import Refused, ServerLost, TransportRefused
from ormo_rpc.kernels.page_locked import lock, zeros
from ormo_rpc.messages import Push, Reply, no_buffers
from ormo_rpc.rendezvous.protocol import LineReader, send
from ormo_rpc.transports.base import Endpoint, ServerClient, WorkerSide
from ormo_rpc.transports.codec import unpack_error
from ormo_rpc.transports.stream import frames
from ormo_rpc.transports.stream.frames import DTYPES, INLINE, RESPONSE_BYTES, SAME, FrameSocket, Request, Response, bytes_of
from ormo_rpc.transports.stream.shared_memory import AVAILABLE, SegmentHandle, SharedMemoryPool, attach, not_shared
from ormo_rpc.transports.stream.tensor_path import TensorPath

MAX_LINE_BYTES = 64 * 1024
"""The longest line of an authenticated server before the frames begin, which have sizes of their own."""


class StreamWorkerSide(WorkerSide):
    """Connects by frames.

    Args:
        share: Whether to share memory with the server, and to refuse to connect where that cannot be.
    """

    def __init__(self, *, share: bool) -> None:
        self.share = share
        self.pool = SharedMemoryPool() if share and AVAILABLE else None

    @override
    def allocate(self, size: int) -> torch.Tensor:
        if self.pool is None:
            return super().allocate(size)
        return lock(self.pool.vector(size)) if self.page_locked else self.pool.vector(size)

    @override
    @contextlib.contextmanager
    def connect(self, endpoint: Endpoint, payload: torch.Tensor) -> Generator[ServerClient]:
        own_segment = None if self.pool is None else self.pool.handle(payload)
        if self.share and own_segment is None:
            raise TransportRefused("shm", "the worker has no memory that could be shared")
        segment = None if own_segment is None else asdict(own_segment)
        with connection(endpoint, payload, {"segment": segment}) as (reader, answer):
            server_segment, reason = None, endpoint.reason
            if own_segment is not None:
                server_segment, reason = _attached(answer), "worker and server share memory"
            stream = begun(reader, endpoint, shared=server_segment is not None, reason=reason)
            yield StreamClient(stream, payload, server_segment, page_locked=self.page_locked)


@contextlib.contextmanager
def connection(
    endpoint: Endpoint, payload: torch.Tensor, wanted: Mapping[str, Any]
) -> Generator[tuple[LineReader, Mapping[str, Any]]]:
    """Open a connection, and present the session with what is wanted; the value has the server's answer to that.

    Raises:
        ServerLost: the server cannot be reached.
        Refused: pushes have another size than the server expects.
    """
    with _lost_connections():
        reader = endpoint.open_connection()
    with reader.sock:
        size = payload.numel() * payload.itemsize
        with _lost_connections():
            send(reader.sock, {"session_id": endpoint.session_id, **wanted, "size": size})
            answer = reader.receive(endpoint.timeout_seconds, MAX_LINE_BYTES)
            if "error" in answer:
                raise EOFError(answer["error"])
        if answer["size"] != size:
            raise Refused(
                f"stream: push: got {size} bytes, expected {answer['size']}; worker and server must have the same model and "
                f"wire format"
            )
        yield reader, answer


def begun(reader: LineReader, endpoint: Endpoint, *, shared: bool, reason: str) -> FrameSocket:
    """Tell the server whether what was wanted is used, and begin with the frames.

    Raises:
        ServerLost: the connection has ended.
    """
    with _lost_connections():
        send(reader.sock, {"shared": shared, "reason": reason})
        reader.receive(endpoint.timeout_seconds, MAX_LINE_BYTES)  # the frames begin behind it
    return FrameSocket(reader.sock, endpoint.alive)


@contextlib.contextmanager
def _lost_connections() -> Generator[None]:
    try:
        yield
    except (OSError, EOFError) as error:
        raise ServerLost(f"no connection to the server: {error or type(error).__name__}") from None


def _attached(answer: Mapping[str, Any]) -> SegmentHandle:
    """A segment of the server's that this process can read.

    Raises:
        TransportRefused: no memory can be shared.
    """
    if answer["segment"] is None:
        raise TransportRefused("shm", str(answer["reason"]))
    segment = SegmentHandle(**answer["segment"])
    try:
        attach(segment, 1)
    except OSError as error:
        raise TransportRefused("shm", not_shared(error)) from None
    return segment


class StreamClient(ServerClient):
    """Calls the server by frames.

    Shared parameters are the server's own memory, mapped for reading, which it leaves alone until the next push; those that
    come behind a frame lie in memory that the next ones are written into.

    Args:
        stream: The connection.
        payload: The wire form of every push.
        server_segment: Any segment of the server's; None where payload and parameters follow the frames.
        page_locked: See `WorkerSide`.
        tensors: The way of all tensors, where they have one of their own.
    """

    def __init__(
        self,
        stream: FrameSocket,
        payload: torch.Tensor,
        server_segment: SegmentHandle | None,
        *,
        page_locked: bool = False,
        tensors: TensorPath | None = None,
    ) -> None:
        self._stream = stream
        self._page_locked = page_locked
        self._server_segment = server_segment
        self._tensors = tensors
        self._payload = payload
        self._inline_payload = (bytes_of(payload),) if server_segment is None and tensors is None else ()
        self._attached: dict[int, torch.Tensor] = {}
        """Segments of the server's by their descriptors, as bytes."""
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._newest_buffers = no_buffers()
        self._frame = bytearray(RESPONSE_BYTES)

    @override
    def register(self) -> Reply:
        return self._call(frames.request(Request.register))

    @override
    def push(self, push: Push) -> Reply:
        if self._tensors is None:
            return self._call(frames.request(Request.push, push), *self._inline_payload)
        self._tensors.ready_push(self._payload)
        return self._call(frames.request(Request.push, push), deliver=self._tensors.deliver)

    @override
    def leave(self) -> None:
        with contextlib.suppress(EOFError):
            self._stream.send(frames.request(Request.leave))
            self._stream.receive(memoryview(bytearray(1)))  # the server closes the connection once it has received the request

    def _call(self, request: bytes, *bodies: memoryview, deliver: Callable[[], None] = lambda: None) -> Reply:
        try:
            self._stream.send(request, *bodies)
            deliver()
            self._stream.receive(memoryview(self._frame))
            kind, dtype, elements, descriptor, buffer_bytes = frames.read_response(self._frame)
            if kind == Response.error:
                error = bytearray(elements)
                self._stream.receive(memoryview(error))
                raise unpack_error(error)
            if descriptor == INLINE or self._tensors is None:
                params = self._vector(dtype, elements, descriptor)
                buffers = self._buffers(buffer_bytes)
            else:
                params, buffers = self._fetched(self._tensors, elements, DTYPES[dtype], buffer_bytes)
        except (EOFError, OSError) as error:
            raise ServerLost(f"the connection to the server is lost: {error}") from None
        return Reply(**frames.reply_numbers(self._frame), params=params, buffers=buffers)

    def _buffers(self, size: int) -> torch.Tensor:
        """The buffers of a response, in memory of their own, as earlier replies keep theirs."""
        if size != SAME:
            self._newest_buffers = torch.empty(size, dtype=torch.uint8)
            self._stream.receive(bytes_of(self._newest_buffers))
        return self._newest_buffers

    def _fetched(
        self, tensors: TensorPath, elements: int, dtype: torch.dtype, buffer_bytes: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Parameters and buffers of a response that came by the way of tensors."""
        size = elements * dtype.itemsize
        tensors.fetch_reply(size, 0 if buffer_bytes == SAME else buffer_bytes)
        if buffer_bytes != SAME:
            self._newest_buffers = tensors.buffers[:buffer_bytes].clone()
        return tensors.params[:size].view(dtype), self._newest_buffers

    def _vector(self, dtype: int, elements: int, descriptor: int) -> torch.Tensor:
        """The parameters of a response, shape (elements,)."""
        size = elements * DTYPES[dtype].itemsize
        if descriptor == INLINE:
            if self._buffer.numel() != size:
                self._buffer = zeros(size, page_locked=self._page_locked)
            self._stream.receive(bytes_of(self._buffer))
            return self._buffer.view(DTYPES[dtype])
        if descriptor not in self._attached:
            assert self._server_segment is not None, "the server names a segment only where memory is shared"
            handle = replace(self._server_segment, descriptor=descriptor)
            try:
                segment = attach(handle, size)
            except OSError:  # such as too many open files: each attached segment costs one
                if not self._attached:
                    raise
                self._attached.clear()
                segment = attach(handle, size)
            self._attached[descriptor] = lock(segment, read_only=True) if self._page_locked else segment
        return self._attached[descriptor].view(DTYPES[dtype])
