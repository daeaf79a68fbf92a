"""A pair: one connection of Gloo's between two processes, made from one exchange of addresses, without a server of stores.

A pair is never repaired: a time-out, or the end of the connection, ends it for good. A message that is larger than the memory
that was posted for it ends the whole process that receives it, so both sides agree on all sizes before a pair is made.

With the connection Gloo ends only the waits for messages of which nothing has crossed: a message that is half-way is waited
for in vain. So a thread waits for nothing but empty messages (`Pair.receive_empty`), which have no half-way: by one of them the
other side says that all it sent before has left, or that all it was sent has come.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage] # documented, not annotated as public
from typing_extensions import override

SERVER, WORKER = 0, 1
"""The ranks of the two sides."""
TOKEN_BYTES = 16
DESCRIPTORS = Path("/dev/fd")
"""The descriptors of this process."""
NOTHING_CAME = "nothing came in time"
CONNECT_FACTOR = 5
"""Gloo waits for the first connection of a group this many times its time-out."""
_REASONS = {
    "Connection closed by peer": "the other side has closed the connection",
    "Connection reset by peer": "the other side has closed the connection",
    "Broken pipe": "the other side has closed the connection",
    "Application timeout": "an earlier time-out has ended it",
    "Connection refused": "the other side's port refuses connections",
    "imed out": NOTHING_CAME,
    "Wait timeout": NOTHING_CAME,
    "Connect timeout": NOTHING_CAME,
}
"""The errors of Gloo's, which differ by their texts only."""
_EMPTY = torch.empty(0, dtype=torch.uint8)
_SOCKADDR = 128
"""Bytes of an address in the words of the system (sockaddr_storage)."""
_IN_SOCKADDR: dict[int, tuple[int, int]] = {socket.AF_INET: (4, 4), socket.AF_INET6: (8, 16)}
"""The place and the bytes of the host in it, by family; the port stands at 2."""


class PairLost(Exception):
    """The pair is at its end, or was not made; the message says why. Make another one."""


@dataclass(frozen=True, kw_only=True)
class Address:
    """The place where one side of a pair listens.

    Attributes:
        host: Its address, in digits.
        port: Its port.
        token: The first bytes that the other side sends, in hexadecimal digits, so that no stranger gets ahead of it.
    """

    host: str
    port: int
    token: str

    @classmethod
    def parse(cls, value: object) -> Address:
        """Check what came from the other side: bytes that Gloo does not expect would end this process.

        Raises:
            ValueError: it is no address.
        """
        given = value if isinstance(value, Mapping) else {}
        host, port, token = (given.get(name) for name in ("host", "port", "token"))
        if not (isinstance(host, str) and type(port) is int and 0 < port < 1 << 16 and isinstance(token, str)):
            raise ValueError("gloo: address: got other fields than expected: host, port, token")
        if len(token) != 2 * TOKEN_BYTES or not set(token) <= set("0123456789abcdef"):
            raise ValueError(f"gloo: address: token: expected {2 * TOKEN_BYTES} hexadecimal digits")
        _packed(host)
        return cls(host=host, port=port, token=token)


class Transfer:
    """A message under way: its memory exists, and must be left alone, until `wait` has returned."""

    __slots__ = ("_tensor", "_work")

    def __init__(self, work: Any, tensor: Tensor) -> None:
        self._work = work
        self._tensor = tensor

    def wait(self, timeout: timedelta) -> None:
        """Wait until the memory is filled, or the message has left; not before an empty message says so.

        Raises:
            PairLost: the pair is at its end, since the time has passed or for another reason.
        """
        try:
            self._work.wait(timeout)
        except RuntimeError as error:
            raise PairLost(_reason(error)) from None


class Pair:
    """One side of a pair. A message has a tag, by which it meets the memory that the other side has posted for it.

    One thread sends and receives; any may close. `_lock` guards `_connections`.

    Args:
        group: Gloo's group of the two.
        rank: This side's.
        connections: Duplicates of the descriptor of the pair's own connection.
    """

    def __init__(self, group: Any, rank: int, connections: list[socket.socket]) -> None:
        self._group = group
        self._other = WORKER - rank
        self._lock = threading.Lock()
        self._connections = connections

    def receive(self, into: Tensor, tag: int) -> Transfer:
        """Post memory for one message of at most that many bytes; a larger one ends this process.

        Raises:
            PairLost: the pair is at its end.
        """
        try:
            return Transfer(self._group.recv([into], self._other, tag), into)
        except RuntimeError as error:
            raise PairLost(_reason(error)) from None

    def send(self, tensor: Tensor, tag: int) -> Transfer:
        """Begin to send a message; it leaves once the other side has posted memory for it.

        Raises:
            PairLost: the pair is at its end.
        """
        try:
            return Transfer(self._group.send([tensor], self._other, tag), tensor)
        except RuntimeError as error:
            raise PairLost(_reason(error)) from None

    def receive_empty(self, tag: int) -> Transfer:
        """Post an empty message. Once it has come, so has all that was posted, and sent, before it.

        Raises:
            PairLost: the pair is at its end.
        """
        return self.receive(_EMPTY, tag)

    def send_empty(self, tag: int) -> Transfer:
        """Begin to send an empty message.

        Raises:
            PairLost: the pair is at its end.
        """
        return self.send(_EMPTY, tag)

    def close(self) -> None:
        """End the pair: a thread of either side that waits for an empty message is woken at once."""
        with self._lock:
            connections, self._connections = self._connections, []
        for connection in connections:
            with connection, contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def make_pair(rank: int, host: str, exchange: Callable[[Address], Address], timeout_seconds: float) -> Pair:
    """Make one side of a pair, while the other process makes the other side.

    Args:
        rank: SERVER or WORKER.
        host: The address of this machine, or its name, that the pair is bound to.
        exchange: Given this side's address, returns that of the other side; it may wait for it.
        timeout_seconds: For the connection, once addresses are exchanged.

    Raises:
        PairLost: there is no connection, for the reason in the message.
    """
    token = secrets.token_hex(TOKEN_BYTES)
    store = _Exchange(rank, token, exchange)
    try:
        group = _connected_group(store, rank, host, token, timedelta(seconds=timeout_seconds))
    except (RuntimeError, PairLost) as error:
        if store.failure is not None:
            raise store.failure from None
        reason = str(error) if isinstance(error, PairLost) else _reason(error)
        raise PairLost(f"no connection within {timeout_seconds:g} s" if reason == NOTHING_CAME else reason) from None
    return Pair(group, rank, _connections_between(store.own, store.other))


def _connected_group(store: _Exchange, rank: int, host: str, token: str, timeout: timedelta) -> Any:
    """Make Gloo's group of the two, and take the token that the other side sends first: only then is it connected."""
    gloo: Any = dist.ProcessGroupGloo  # torch's stubs leave out most of it
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=host)]
    options._timeout = timeout / CONNECT_FACTOR
    options._threads = 0  # the device's own thread does all
    group = gloo(store, rank, 2, options)
    other = WORKER - rank
    came = torch.empty(TOKEN_BYTES, dtype=torch.uint8)
    told = torch.frombuffer(bytearray.fromhex(store.other.token), dtype=torch.uint8)
    for transfer in (Transfer(group.recv([came], other, 0), came), Transfer(group.send([told], other, 0), told)):
        transfer.wait(timeout)
    if bytes(came.tolist()).hex() != token:
        raise PairLost("another process than the one that was meant has connected")
    return group


class _Exchange(Store):
    """Stands in the place of a store between the two sides of a pair: each side's value is made of its address.

    Args:
        rank: This side's.
        token: Of its address.
        exchange: See `make_pair`.

    Attributes:
        own: This side's address, once it has one.
        other: The other side's, once it was exchanged.
        failure: The error of the exchange, which Gloo may wrap.
    """

    own: Address
    other: Address
    failure: Exception | None = None

    def __init__(self, rank: int, token: str, exchange: Callable[[Address], Address]) -> None:
        super().__init__()
        self._rank = rank
        self._token = token
        self._exchange = exchange
        self._value = b""

    @override
    def set(self, key: str, value: Any) -> None:
        del key  # there is one
        self._value = bytes(value)

    @override
    def wait(self, keys: Any, timeout: Any = None) -> None:
        """Return at once: `get` waits."""

    @override
    def get(self, key: str) -> bytes:
        if key.endswith(f"/{self._rank}"):
            return self._value
        family, host, port = _read_value(self._value)
        self.own = Address(host=host, port=port, token=self._token)
        try:
            self.other = self._exchange(self.own)
        except Exception as error:
            self.failure = error
            raise
        other_family, packed = _packed(self.other.host)
        if other_family != family:
            raise RuntimeError(f"{host} and {self.other.host} are addresses of different kinds (IPv4 and IPv6)")
        return _with_address(self._value, family, packed, self.other.port)


def _packed(host: str) -> tuple[int, bytes]:
    """The family and the bytes of an address in digits."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError, ValueError):
            return family, socket.inet_pton(family, host)
    raise ValueError(f"gloo: address: host: got {host[:100]!r}, expected an address in digits")


def _address_start(value: bytes) -> int:
    """The place of the address in a value of Gloo's: behind the name of the host, each with its length in front."""
    (name_bytes,) = struct.unpack_from("=Q", value)
    start = 8 + name_bytes + 8
    (address_bytes,) = struct.unpack_from("=Q", value, start - 8)
    if not _SOCKADDR <= address_bytes <= len(value) - start:
        raise struct.error(f"an address of {address_bytes} bytes")
    return start


def _read_value(value: bytes) -> tuple[int, str, int]:
    """Family, host and port of the address in a value of Gloo's."""
    try:
        start = _address_start(value)
        (family,) = struct.unpack_from("=H", value, start)
        place, size = _IN_SOCKADDR[family]
    except (struct.error, KeyError):
        raise RuntimeError(f"this build of torch ({torch.__version__}) writes addresses of Gloo's in another form") from None
    (port,) = struct.unpack_from(">H", value, start + 2)
    return family, socket.inet_ntop(family, value[start + place : start + place + size]), port


def _with_address(value: bytes, family: int, packed: bytes, port: int) -> bytes:
    """A value of Gloo's with another address, all else being equal, since each pair has its first of a device of its own."""
    start = _address_start(value)
    between = b"" if family == socket.AF_INET else bytes(4)
    address = struct.pack("=H", family) + struct.pack(">H", port) + between + packed
    return value[:start] + address.ljust(_SOCKADDR, b"\0") + value[start + _SOCKADDR :]


def _connections_between(own: Address, other: Address) -> list[socket.socket]:
    """Duplicates of the descriptors of the connection whose one end is the address of either side.

    Gloo has no call that wakes a thread which waits; shutting its connection down does. A stranger that has connected to this
    side's port is among them, and loses nothing that it should have.

    Raises:
        PairLost: there are none.
    """
    found: dict[int, socket.socket] = {}
    for number in map(int, os.listdir(DESCRIPTORS)):  # noqa: PTH208 - names are enough
        if number in found:  # that of the folder itself, which is free by now
            continue
        with contextlib.suppress(OSError):
            descriptor = os.dup(number)  # first of all, so that it is the same one from here on
            try:
                local, remote = _ends(descriptor)
            except OSError:
                os.close(descriptor)
                raise
            if local == (own.host, own.port) or remote == (other.host, other.port):
                found[descriptor] = socket.socket(fileno=descriptor)
            else:
                os.close(descriptor)
    if not found:
        raise PairLost("its connection is not among the descriptors of this process")
    return list(found.values())


def _ends(descriptor: int) -> tuple[tuple[str, int], tuple[str, int]]:
    """Both ends of a connection.

    Raises:
        OSError: the descriptor is none.
    """
    connection = socket.socket(fileno=descriptor)
    try:
        return connection.getsockname()[:2], connection.getpeername()[:2]
    finally:
        connection.detach()


def _reason(error: Exception) -> str:
    """The reason in an error of Gloo's, on one line."""
    text = str(error)
    known = next((reason for part, reason in _REASONS.items() if part in text), None)
    return known or " ".join(text.split())[:300] or type(error).__name__
