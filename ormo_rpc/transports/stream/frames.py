"""The frames of a stream: fixed-size headers, some with the bytes of a vector behind them. Nothing in them is unpickled.

A worker sends requests and the server answers each with one response. A vector comes as its bytes, in the machine's order, or
lies in memory that both sides share (`shared_memory`); a response then has the descriptor of its segment. The buffers of a
reply come as bytes, behind everything else, unless they are those of the reply before.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import torch

from ormo_rpc.messages import Push, Reply
from ormo_rpc.transports.codec import PUSH, REPLY
from ormo_rpc.transports.pending_replies import LIVENESS_SECONDS

_KIND = struct.Struct("<q")
"""Of a request: its kind, then the numbers of a push."""
_VECTOR = struct.Struct("<qqqqq")
"""Of a response: its kind, the vector's dtype, elements and descriptor, bytes of buffers; then the numbers of a reply."""
REQUEST_BYTES = _KIND.size + PUSH.size
RESPONSE_BYTES = _VECTOR.size + REPLY.size
INLINE = -1
"""In the place of a descriptor: the bytes follow the frame."""
SAME = -1
"""In the place of the bytes of the buffers: they are those of the reply before, of none at the first one."""
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""A dtype crosses as its index."""


class Request(IntEnum):
    """The kinds of requests."""

    register = 1
    push = 2
    leave = 3


class Response(IntEnum):
    """The kinds of responses; the bytes behind an error are JSON."""

    reply = 1
    error = 2


def request(kind: Request, push: Push | None = None) -> bytes:
    """A request's frame."""
    return _KIND.pack(kind) + (bytes(PUSH.size) if push is None else PUSH.pack(push))


def read_kind(frame: bytearray | memoryview) -> int:
    """The kind of the request in a frame, which may be an unknown one."""
    return _KIND.unpack_from(frame)[0]


def reply_frame(reply: Reply, descriptor: int, *, same_buffers: bool = False) -> bytes:
    """The frame of a reply whose parameters lie in a segment, or follow (`INLINE`); without a ticket nothing follows."""
    dtype, elements = (0, 0) if reply.ticket is None else (DTYPES.index(reply.params.dtype), reply.params.numel())
    buffer_bytes = 0 if reply.ticket is None else SAME if same_buffers else reply.buffers.numel()
    return _VECTOR.pack(Response.reply, dtype, elements, descriptor, buffer_bytes) + REPLY.pack(reply)


def error_frame(size: int) -> bytes:
    """The frame of an error reply of that many bytes, which follow."""
    return _VECTOR.pack(Response.error, 0, size, INLINE, 0) + bytes(REPLY.size)


def read_response(frame: bytearray | memoryview) -> tuple[int, int, int, int, int]:
    """Kind, dtype, elements and descriptor of a response, and the bytes of its buffers."""
    return _VECTOR.unpack_from(frame)


def push_numbers(frame: bytearray | memoryview) -> dict[str, Any]:
    """The numbers of the push in a request's frame."""
    return PUSH.unpack(frame, _KIND.size)


def reply_numbers(frame: bytearray | memoryview) -> dict[str, Any]:
    """The numbers of the reply in a response's frame."""
    return REPLY.unpack(frame, _VECTOR.size)


class FrameSocket:
    """A connection that carries frames.

    Args:
        connection: The connection, whose time-outs are set here.
        alive: Asked once a second while waiting; where it is false, waiting ends.
    """

    def __init__(self, connection: socket.socket, alive: Callable[[], bool]) -> None:
        self.connection = connection
        self.alive = alive
        connection.setblocking(True)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The system's own time-outs cost no call for each wait, unlike those of the socket object.
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            connection.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", LIVENESS_SECONDS, 0))

    def send(self, frame: bytes, *bodies: memoryview) -> None:
        """Send a frame and the bytes behind it.

        Raises:
            EOFError: the connection has ended, or the other side is not alive.
        """
        parts = [memoryview(frame), *bodies]
        while parts:
            try:
                sent = self.connection.sendmsg(parts)
            except BlockingIOError:
                self._check_alive()
                continue
            except OSError as error:
                raise EOFError(f"the connection has ended: {error}") from None
            while parts and sent >= len(parts[0]):
                sent -= len(parts.pop(0))
            if parts:  # the time-out has passed: a peer that takes one byte a second is no better than one that takes none
                parts[0] = parts[0][sent:]
                self._check_alive()

    def receive(self, into: memoryview) -> None:
        """Fill a buffer.

        Raises:
            EOFError: the connection has ended, or the other side is not alive.
        """
        while into:
            try:
                count = self.connection.recv_into(into, flags=socket.MSG_WAITALL)
            except BlockingIOError:
                self._check_alive()
                continue
            except OSError as error:
                raise EOFError(f"the connection has ended: {error}") from None
            if count == 0:
                raise EOFError("the connection has ended")
            into = into[count:]
            if into:  # the time-out has passed, as above
                self._check_alive()

    def wait(self) -> None:
        """Wait until the other side sends anything or ends, alive or not, or the server shuts the connection down."""
        while True:
            try:
                self.connection.recv(1, socket.MSG_PEEK)
            except BlockingIOError:  # the time-out has passed
                continue
            except OSError:
                return
            return

    def _check_alive(self) -> None:
        if not self.alive():
            raise EOFError("the other side is not alive")


def bytes_of(vector: torch.Tensor) -> memoryview:
    """The memory of a contiguous vector on the CPU, of any dtype."""
    return memoryview(vector.detach().view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType] # an array is a buffer
