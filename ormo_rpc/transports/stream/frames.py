"""What crosses a stream: frames of fixed size, some with a vector's bytes behind them. Nothing in them is unpickled.

A worker sends `REQUEST` frames and the server answers each with one `RESPONSE`. A vector comes as its bytes, in the machine's order,
or lies in memory that both sides share; see `segments`.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from enum import IntEnum

import torch
from torch import Tensor

REQUEST = struct.Struct("<qqqqqqd")
"""A word, ticket, stamp, incarnation, samples, whether there is a loss, the loss."""
RESPONSE = struct.Struct("<qqqqqdqqq")
"""A word, ticket, stamp, incarnation, steps, lr; of the vector: dtype, elements, the descriptor of its segment or `INLINE`.

With a refusal, the number of elements is that of the bytes of JSON that follow.
"""
INLINE = -1
"""Instead of a descriptor: the bytes follow."""
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""A dtype is its place in here."""
LOOK_SECONDS = 1
"""How often somebody who waits looks whether the other side is still there."""


class Request(IntEnum):
    """What a worker says."""

    register = 1
    push = 2
    leave = 3


class Response(IntEnum):
    """What the server says."""

    work = 1
    stop = 2
    refusal = 3


class Stream:
    """A connection with frames on it.

    Args:
        connection: Its time-outs are ours from now on.
        alive: Asked every second of waiting: whether it still makes sense.
    """

    def __init__(self, connection: socket.socket, alive: Callable[[], bool]) -> None:
        self.connection = connection
        self.alive = alive
        connection.setblocking(True)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The system's own time-outs cost no call for each wait, unlike those of the socket object.
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            connection.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", LOOK_SECONDS, 0))

    def send(self, frame: bytes, behind: memoryview | None = None) -> None:
        """Send a frame and what is behind it.

        Raises:
            EOFError: the connection has ended, or it makes no sense any more.
        """
        parts = [memoryview(frame)] if behind is None else [memoryview(frame), behind]
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
            if parts:  # the time is over, too: whoever takes a byte a second is no better than one who takes none
                parts[0] = parts[0][sent:]
                self._check_alive()

    def receive(self, into: memoryview) -> None:
        """Fill a buffer.

        Raises:
            EOFError: the connection has ended, or it makes no sense any more.
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
            if into:  # as above
                self._check_alive()

    def _check_alive(self) -> None:
        if not self.alive():
            raise EOFError("the other side is gone")


def bytes_of(vector: Tensor) -> memoryview:
    """The memory of a contiguous vector on the CPU, of any dtype."""
    return memoryview(vector.detach().view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType] # an array is a buffer
