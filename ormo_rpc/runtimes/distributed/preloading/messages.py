"""Messages between a launcher and a preloader: JSON behind its length, with file descriptors beside it."""

from __future__ import annotations

import array
import json
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import Any

MAX_DESCRIPTORS = 16
"""With one message."""
_LENGTH = struct.Struct("<Q")


def send(sock: socket.socket, message: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
    """Send a message.

    Raises:
        OSError: the other side is gone, or did not take it in time.
    """
    body = json.dumps(message).encode()
    header = _LENGTH.pack(len(body))
    sent = socket.send_fds(sock, [header], list(descriptors))
    sock.sendall(header[sent:] + body)


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Receive a message and the descriptors that came with it, which the caller owns.

    Raises:
        EOFError: the other side is gone.
        OSError: nothing came in time, or there are too many open files for the descriptors.
    """
    space = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)
    header, ancillary, flags, _ = sock.recvmsg(_LENGTH.size, space)
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    for number in descriptors:
        os.set_inheritable(number, False)
    try:
        length = _LENGTH.unpack(_rest(sock, header, _LENGTH.size))[0]
        message = json.loads(_rest(sock, b"", length))
    except BaseException:
        close_all(descriptors)
        raise
    return {**message, "incomplete": True} if flags & socket.MSG_CTRUNC else message, list(descriptors)


def close_all(descriptors: Sequence[int]) -> None:
    """Close descriptors."""
    for number in descriptors:
        os.close(number)


def _rest(sock: socket.socket, begun: bytes, length: int) -> bytes:
    data = bytearray(begun)
    while len(data) < length:
        part = sock.recv(min(1 << 20, length - len(data)))
        if not part:
            raise EOFError("the other side is gone")
        data += part
    return bytes(data)
