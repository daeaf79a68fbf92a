"""What crosses the door's connections: one JSON object a line, with limits, and the handshake that opens each of them.

Nothing here trusts the other side: a line has a largest length, a message a time by which it must be whole, and until both
sides have proved that they know the secret, nothing that came is looked at beyond what the proof needs.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from collections.abc import Mapping
from typing import Any, NoReturn, TypeGuard

from ormo_rpc.errors import Refused, WireError
from ormo_rpc.rendezvous.secret import NONCE_CHARACTERS, PROTOCOL, Secret, nonce, proof, verify

GREETING_BYTES = 16 * 1024
"""The longest line of a handshake."""
SEND_SECONDS = 10.0
"""How long somebody who does not read may hold a sender."""
_CHUNK_BYTES = 64 * 1024
_WRONG_SECRET = "wrong secret"  # noqa: S105 - what is said of one


def send(sock: socket.socket, message: Mapping[str, Any], timeout_seconds: float = SEND_SECONDS) -> None:
    """Send one message. Threads that share a connection hold a lock of their own around it.

    Raises:
        TimeoutError: the other side has not taken it in time; part of it may be under way, so close the connection.
        OSError: the connection is gone.
    """
    data = memoryview(json.dumps(message, allow_nan=False, separators=(",", ":")).encode() + b"\n")
    deadline = time.monotonic() + timeout_seconds
    while data:
        _wait(sock, select.POLLOUT, deadline, "the other side does not read")
        try:
            data = data[sock.send(data, socket.MSG_DONTWAIT) :]
        except BlockingIOError:
            continue


class LineReader:
    """Reads messages from a connection; what has come of the next one stays here.

    Args:
        sock: The connection; its own time-out is neither used nor changed, so another thread may send meanwhile. Whoever
            wants to wake a reader shuts the connection down before closing it.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._buffer = bytearray()

    def receive(self, timeout_seconds: float, limit_bytes: int) -> dict[str, Any]:
        """The next message.

        Args:
            timeout_seconds: For the whole of it, however slowly its bytes come.
            limit_bytes: The longest line, its end included.

        Raises:
            TimeoutError: it is not whole in time; what has come is kept for the next call.
            EOFError: the other side is gone, between two messages.
            WireError: the line is too long, is not a JSON object in UTF-8, or the other side was gone in the middle of it.
        """
        deadline = time.monotonic() + timeout_seconds
        seen = 0
        while (end := self._buffer.find(b"\n", seen, limit_bytes)) < 0:
            seen = len(self._buffer)
            if seen >= limit_bytes:
                raise WireError(f"a line of more than {limit_bytes} bytes came, expected a shorter one")
            _wait(self.sock, select.POLLIN, deadline, "no whole message came")
            try:
                data = self.sock.recv(min(_CHUNK_BYTES, limit_bytes - seen), socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except OSError:  # a connection that is reset is at its end as well
                data = b""
            if not data:
                if self._buffer:
                    raise WireError(f"the connection ended in the middle of a message, after {seen} bytes of it")
                raise EOFError("the connection has ended")
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return _parsed(line)


def greet_worker(reader: LineReader, secret: Secret, timeout_seconds: float) -> dict[str, Any]:
    """In the server: let somebody prove that it knows the secret, prove it in turn, and return what it says of itself.

    Afterwards the server sends messages of its own with `send(reader.sock, ...)`.

    Args:
        reader: A new connection.
        secret: The secret of the run.
        timeout_seconds: For the whole handshake.

    Raises:
        WireError: another version or secret, or nothing that we understand; the other side has been told.
        EOFError: it went away.
        TimeoutError: it took too long.
        OSError: the connection broke while we were sending.
    """
    deadline = time.monotonic() + timeout_seconds
    mine = nonce()
    send(reader.sock, {"ormo_rpc": PROTOCOL, "nonce": mine}, timeout_seconds)
    answer = reader.receive(_left(deadline), GREETING_BYTES)
    if "error" in answer:
        raise Refused(_printable(answer["error"]))
    if answer.get("ormo_rpc") != PROTOCOL:
        _refuse(reader.sock, _other_version(answer.get("ormo_rpc"), "worker", "server"), deadline)
    theirs, hello = answer.get("nonce"), answer.get("hello")
    if not _is_nonce(theirs) or not isinstance(hello, dict):
        _refuse(reader.sock, "the answer to the greeting has no nonce or no hello", deadline)
    try:
        known = verify(answer.get("proof"), secret, "worker", mine, theirs, hello)
    except RecursionError:  # a hello that is nested as deep as a parser takes it
        known = False
    if not known:
        _refuse(reader.sock, _WRONG_SECRET, deadline)
    send(reader.sock, {"proof": proof(secret, "server", mine, theirs, hello)}, _left(deadline))
    return hello


def greet_server(reader: LineReader, secret: Secret, hello: Mapping[str, Any], timeout_seconds: float) -> None:
    """In a worker: prove that it knows the secret, and make sure that the server does.

    Afterwards the worker reads the server's messages with the same reader.

    Args:
        reader: A new connection.
        secret: The secret of the run.
        hello: What the worker says of itself, of JSON's types; it goes to the server before that has proved anything.
        timeout_seconds: For the whole handshake.

    Raises:
        Refused: the server has said why it does not go on.
        WireError: another version, or it is not a server that knows the secret.
        EOFError: it went away.
        TimeoutError: it took too long.
        OSError: the connection broke while we were sending.
    """
    deadline = time.monotonic() + timeout_seconds
    greeting = reader.receive(timeout_seconds, GREETING_BYTES)
    if "error" in greeting:
        raise Refused(_printable(greeting["error"]))
    if greeting.get("ormo_rpc") != PROTOCOL:
        _refuse(reader.sock, _other_version(greeting.get("ormo_rpc"), "server", "worker"), deadline)
    theirs, mine = greeting.get("nonce"), nonce()
    if not _is_nonce(theirs):
        _refuse(reader.sock, "the greeting has no nonce", deadline)
    mine_proof = proof(secret, "worker", theirs, mine, hello)
    send(reader.sock, {"ormo_rpc": PROTOCOL, "nonce": mine, "proof": mine_proof, "hello": dict(hello)}, _left(deadline))
    answer = reader.receive(_left(deadline), GREETING_BYTES)
    if "error" in answer:
        raise Refused(_printable(answer["error"]))
    if not verify(answer.get("proof"), secret, "server", theirs, mine, hello):
        _refuse(reader.sock, "the server does not know the secret", deadline)


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line.decode(), parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise WireError("a line came that is not text in UTF-8, expected a JSON object") from None
    except (ValueError, RecursionError):  # a number of too many digits is a ValueError, too deep a nesting the other
        raise WireError("a line came that is not JSON, expected a JSON object") from None
    if not isinstance(message, dict):
        raise WireError(f"a JSON {type(message).__name__} came, expected an object")
    return message


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _wait(sock: socket.socket, event: int, deadline: float, what: str) -> None:
    poll = select.poll()
    try:
        poll.register(sock, event)
    except ValueError:  # closed on our side
        raise EOFError("the connection is closed") from None
    remaining = deadline - time.monotonic()
    if remaining <= 0 or not poll.poll(remaining * 1000):
        raise TimeoutError(f"{what} in time")


def _left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


def _refuse(sock: socket.socket, reason: str, deadline: float) -> NoReturn:
    """Tell the other side, where it still listens, and give up."""
    with contextlib.suppress(OSError, EOFError):
        send(sock, {"error": reason}, min(1.0, _left(deadline)))
    raise WireError(reason)


def _is_nonce(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and len(value) == NONCE_CHARACTERS and value.isascii()


def _other_version(theirs: object, other: str, here: str) -> str:
    got = str(theirs) if type(theirs) is int and abs(theirs) < 10**9 else "none"
    return f"protocol: the {other} has version {got}, the {here} version {PROTOCOL}; install the same ormo_rpc on both"


def _printable(text: object) -> str:
    """What the other side says, on one line, without anything that a terminal would act on."""
    shown = str(text)[:500] if isinstance(text, str) else "no reason given"
    return "".join(character if character.isprintable() else "?" for character in shown)
