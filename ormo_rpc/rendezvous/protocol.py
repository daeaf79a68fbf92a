"""The rendezvous protocol: one JSON object a line, with limits; the handshake of each connection; and the admission.

Nothing here trusts the other side: a line has a largest length, a message a time by which it must be complete, and until both
sides are authenticated, nothing that came is looked at beyond what the proof needs.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeGuard, TypeVar

from ormo_rpc.errors import Refused, WireError
from ormo_rpc.rendezvous.secret import NONCE_CHARACTERS, PROTOCOL_VERSION, Secret, nonce, proof, verify

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MAX_HANDSHAKE_BYTES = 16 * 1024
"""The longest line of a handshake."""
SEND_TIMEOUT_SECONDS = 10.0
"""After this time a peer that does not read no longer blocks a sender."""
MAX_NAME_CHARACTERS = 64
"""Longer names of hosts and slots are cut."""
_CHUNK_BYTES = 64 * 1024
_WRONG_SECRET = "wrong secret"  # noqa: S105 - the reason for a refusal
_INSTALL_THE_SAME = "install the same ormo_rpc on both"
T = TypeVar("T", bound="DataclassInstance")


@dataclass(frozen=True, kw_only=True)
class Admission:
    """Sent by the server to a process that is authenticated and holds a lease from now on.

    Attributes:
        admission_id: Shows, when the process joins, that it holds this lease.
        control: The carrier of the control plane: ``rpc`` or ``socket``.
        agent: The address of the server's agent; None without one.
        heartbeat_seconds: The interval of its heartbeats.
        timeout_seconds: After this much silence each side takes the other one for dead.
        call_timeout_seconds: After this time a call of the control plane has failed.
    """

    admission_id: str
    control: str
    agent: str | None
    heartbeat_seconds: float
    timeout_seconds: float
    call_timeout_seconds: float


def from_server(cls: type[T], message: Mapping[str, Any], name: str) -> T:
    """Read a message of an authenticated server, which may have further fields.

    Args:
        cls: A dataclass, with the fields of the message.
        message: The message.
        name: Of the message, in words.

    Raises:
        WireError: a field is missing.
    """
    names = cls.__dataclass_fields__
    missing = [each for each in names if each not in message]
    if missing:
        raise WireError(f"{name}: got no {', '.join(missing)}; {_INSTALL_THE_SAME}")
    return cls(**{each: message[each] for each in names})


def send(sock: socket.socket, message: Mapping[str, Any], timeout_seconds: float = SEND_TIMEOUT_SECONDS) -> None:
    """Send one message. Threads that share a connection hold a lock of their own around it.

    Raises:
        TimeoutError: the peer did not take it in time; part of it may be under way, so close the connection.
        OSError: the connection is closed.
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
    """Reads messages from a connection, and keeps what has arrived of the next one.

    Args:
        sock: The connection; its own time-out is neither used nor changed, so another thread may send meanwhile. To wake a
            reader, shut the connection down before closing it.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._buffer = bytearray()

    def receive(self, timeout_seconds: float, limit_bytes: int) -> dict[str, Any]:
        """Return the next message.

        Args:
            timeout_seconds: For the whole of it, however slowly its bytes come.
            limit_bytes: The longest line, its end included.

        Raises:
            TimeoutError: it is incomplete; what has arrived is kept for the next call.
            EOFError: the connection ended between two messages.
            WireError: the line is too long, is not a JSON object in UTF-8, or the connection ended in the middle of it.
        """
        deadline = time.monotonic() + timeout_seconds
        seen = 0
        while (end := self._buffer.find(b"\n", seen, limit_bytes)) < 0:
            seen = len(self._buffer)
            if seen >= limit_bytes:
                raise WireError(f"a line of more than {limit_bytes} bytes came, expected a shorter one")
            _wait(self.sock, select.POLLIN, deadline, "no complete message came")
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


def authenticate_worker(reader: LineReader, secret: Secret, timeout_seconds: float) -> dict[str, Any]:
    """Check, in the server, that the other side knows the secret; prove it in turn, and return the worker's request.

    Afterwards the server sends its own messages with `send(reader.sock, ...)`.

    Args:
        reader: A new connection.
        secret: The secret of the run.
        timeout_seconds: For the whole handshake.

    Raises:
        WireError: another version or secret, or a malformed answer; the other side has been sent the reason.
        Refused: the worker has refused the server, for a reason of its own.
        EOFError: the connection ended.
        TimeoutError: the handshake took too long.
        OSError: the connection failed while sending.
    """
    deadline = time.monotonic() + timeout_seconds
    server_nonce = nonce()
    send(reader.sock, {"ormo_rpc": PROTOCOL_VERSION, "nonce": server_nonce}, timeout_seconds)
    answer = reader.receive(_left(deadline), MAX_HANDSHAKE_BYTES)
    if "error" in answer:
        raise Refused(printable(answer["error"]))
    if answer.get("ormo_rpc") != PROTOCOL_VERSION:
        _refuse(reader.sock, _other_version(answer.get("ormo_rpc"), "worker", "server"), deadline)
    worker_nonce, request = answer.get("nonce"), answer.get("request")
    if not _is_nonce(worker_nonce) or not isinstance(request, dict):
        _refuse(reader.sock, "the answer to the server's nonce has no nonce or no request", deadline)
    try:
        known = verify(answer.get("proof"), secret, "worker", server_nonce, worker_nonce, request)
    except RecursionError:  # a request that is nested as deep as a parser takes it
        known = False
    if not known:
        _refuse(reader.sock, _WRONG_SECRET, deadline)
    send(reader.sock, {"proof": proof(secret, "server", server_nonce, worker_nonce, request)}, _left(deadline))
    return request


def authenticate_server(reader: LineReader, secret: Secret, request: Mapping[str, Any], timeout_seconds: float) -> None:
    """Prove, in a worker, that it knows the secret, and check that the server does.

    Afterwards the worker reads the server's messages with the same reader.

    Args:
        reader: A new connection.
        secret: The secret of the run.
        request: What the connection is for, of JSON's types; it is sent before the server is authenticated.
        timeout_seconds: For the whole handshake.

    Raises:
        Refused: the server has given its reason for a refusal.
        WireError: another version, or a server that does not know the secret.
        EOFError: the connection ended.
        TimeoutError: the handshake took too long.
        OSError: the connection failed while sending.
    """
    deadline = time.monotonic() + timeout_seconds
    challenge = reader.receive(timeout_seconds, MAX_HANDSHAKE_BYTES)
    if "error" in challenge:
        raise Refused(printable(challenge["error"]))
    if challenge.get("ormo_rpc") != PROTOCOL_VERSION:
        _refuse(reader.sock, _other_version(challenge.get("ormo_rpc"), "server", "worker"), deadline)
    server_nonce, worker_nonce = challenge.get("nonce"), nonce()
    if not _is_nonce(server_nonce):
        _refuse(reader.sock, "the server's first message has no nonce", deadline)
    proved = {"proof": proof(secret, "worker", server_nonce, worker_nonce, request), "request": dict(request)}
    send(reader.sock, {"ormo_rpc": PROTOCOL_VERSION, "nonce": worker_nonce, **proved}, _left(deadline))
    answer = reader.receive(_left(deadline), MAX_HANDSHAKE_BYTES)
    if "error" in answer:
        raise Refused(printable(answer["error"]))
    if not verify(answer.get("proof"), secret, "server", server_nonce, worker_nonce, request):
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
    except ValueError:  # this side has closed it
        raise EOFError("the connection is closed") from None
    remaining = deadline - time.monotonic()
    if remaining <= 0 or not poll.poll(remaining * 1000):
        raise TimeoutError(f"{what} in time")


def _left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


def _refuse(sock: socket.socket, reason: str, deadline: float) -> NoReturn:
    """Send the reason to the other side, if it still reads, and raise it."""
    with contextlib.suppress(OSError, EOFError):
        send(sock, {"error": reason}, min(1.0, _left(deadline)))
    raise WireError(reason)


def _is_nonce(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and len(value) == NONCE_CHARACTERS and value.isascii()


def _other_version(version: object, peer: str, side: str) -> str:
    got = str(version) if type(version) is int and abs(version) < 10**9 else "none"
    return f"protocol: the {peer} has version {got}, the {side} version {PROTOCOL_VERSION}; {_INSTALL_THE_SAME}"


def printable(text: object, limit: int = 500) -> str:
    """Text of the other side on one line, without control characters."""
    shown = text[:limit] if isinstance(text, str) else "no reason given"
    return "".join(character if character.isprintable() else "?" for character in shown)
