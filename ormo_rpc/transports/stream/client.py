"""The worker's half of the stream transports."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator
from dataclasses import asdict, replace

import torch
from torch import Tensor
from typing_extensions import override

from ormo_rpc.errors import Refused, ServerLost
from ormo_rpc.messages import NO_BUFFERS, Push, Reply
from ormo_rpc.rendezvous.protocol import LineReader, send
from ormo_rpc.transports.base import Endpoint, ServerClient, WorkerSide
from ormo_rpc.transports.codec import unpack_error
from ormo_rpc.transports.stream import frames
from ormo_rpc.transports.stream.frames import DTYPES, INLINE, RESPONSE_BYTES, SAME, FrameSocket, Request, Response, bytes_of
from ormo_rpc.transports.stream.shared_memory import AVAILABLE, SegmentHandle, SharedMemoryPool, attach

MAX_LINE_BYTES = 64 * 1024
"""The longest line of an authenticated server before the frames begin, which have sizes of their own."""
_log = logging.getLogger(__name__)


class StreamWorkerSide(WorkerSide):
    """Connects by frames.

    Args:
        share: Whether to share memory with the server where both can.
        require: Whether to refuse the run where memory cannot be shared.
    """

    def __init__(self, *, share: bool, require: bool = False) -> None:
        self.require = require
        self.pool = SharedMemoryPool() if share and AVAILABLE else None

    @override
    def allocate(self, size: int) -> Tensor:
        return super().allocate(size) if self.pool is None else self.pool.vector(size)

    @override
    @contextlib.contextmanager
    def connect(self, endpoint: Endpoint, payload: Tensor) -> Generator[ServerClient]:
        own_segment = None if self.pool is None else self.pool.handle(payload)
        try:
            reader = endpoint.open_connection()
        except (OSError, EOFError) as error:
            raise ServerLost(f"no connection to the server: {error or type(error).__name__}") from None
        with reader.sock:
            try:
                server_segment, reason = _negotiate(reader, endpoint, own_segment)
            except (OSError, EOFError) as error:
                raise ServerLost(f"no connection to the server: {error or type(error).__name__}") from None
            if server_segment is None:
                if self.require:
                    raise Refused(f"transport=shm: {reason}; expected a worker on the server's machine, or auto or tcp")
                _log.info("gradients and parameters cross by TCP: %s", reason)
            yield StreamClient(FrameSocket(reader.sock, endpoint.alive), payload, server_segment)


def _negotiate(reader: LineReader, endpoint: Endpoint, own_segment: SegmentHandle | None) -> tuple[SegmentHandle | None, str]:
    """Present the session, and negotiate shared memory; return a segment of the server's, or None and the reason."""
    timeout_seconds = endpoint.timeout_seconds
    send(reader.sock, {"session_id": endpoint.session_id, "segment": None if own_segment is None else asdict(own_segment)})
    answer = reader.receive(timeout_seconds, MAX_LINE_BYTES)
    if "error" in answer:
        raise EOFError(answer["error"])
    reason, server_segment = str(answer["reason"]), None
    if answer["segment"] is not None:
        server_segment = SegmentHandle(**answer["segment"])
        try:
            attach(server_segment, 1)
        except OSError as error:
            server_segment, reason = None, f"worker and server share no memory: {error}"
    send(reader.sock, {"shared": server_segment is not None})
    reader.receive(timeout_seconds, MAX_LINE_BYTES)  # the frames begin behind it
    return server_segment, reason


class StreamClient(ServerClient):
    """Calls the server by frames.

    Shared parameters are the server's own memory, mapped for reading, which it leaves alone until the next push; those that
    come behind a frame lie in memory that the next ones are written into.

    Args:
        stream: The connection.
        payload: The wire form of every push.
        server_segment: Any segment of the server's; None where payload and parameters follow the frames.
    """

    def __init__(self, stream: FrameSocket, payload: Tensor, server_segment: SegmentHandle | None) -> None:
        self._stream = stream
        self._server_segment = server_segment
        self._inline_payload = (bytes_of(payload),) if server_segment is None else ()
        self._attached: dict[int, Tensor] = {}
        """Segments of the server's by their descriptors, as bytes."""
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._newest_buffers = NO_BUFFERS
        self._frame = bytearray(RESPONSE_BYTES)

    @override
    def register(self) -> Reply:
        return self._call(frames.request(Request.register))

    @override
    def push(self, push: Push) -> Reply:
        return self._call(frames.request(Request.push, push), *self._inline_payload)

    @override
    def leave(self) -> None:
        with contextlib.suppress(EOFError):
            self._stream.send(frames.request(Request.leave))
            self._stream.receive(memoryview(bytearray(1)))  # the server closes the connection once it has received the request

    def _call(self, request: bytes, *bodies: memoryview) -> Reply:
        try:
            self._stream.send(request, *bodies)
            self._stream.receive(memoryview(self._frame))
            kind, dtype, elements, descriptor, buffer_bytes = frames.read_response(self._frame)
            if kind == Response.error:
                error = bytearray(elements)
                self._stream.receive(memoryview(error))
                raise unpack_error(error)
            params = self._vector(dtype, elements, descriptor)
            buffers = self._buffers(buffer_bytes)
        except (EOFError, OSError) as error:
            raise ServerLost(f"the connection to the server is lost: {error}") from None
        return Reply(**frames.reply_numbers(self._frame), params=params, buffers=buffers)

    def _buffers(self, size: int) -> Tensor:
        """The buffers of a response, in memory of their own, as earlier replies keep theirs."""
        if size != SAME:
            self._newest_buffers = torch.empty(size, dtype=torch.uint8)
            self._stream.receive(bytes_of(self._newest_buffers))
        return self._newest_buffers

    def _vector(self, dtype: int, elements: int, descriptor: int) -> Tensor:
        """The parameters of a response, shape (elements,)."""
        size = elements * DTYPES[dtype].itemsize
        if descriptor == INLINE:
            if self._buffer.numel() != size:
                self._buffer = torch.empty(size, dtype=torch.uint8)
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
            self._attached[descriptor] = segment
        return self._attached[descriptor].view(DTYPES[dtype])
