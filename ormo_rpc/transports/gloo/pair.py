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
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ormo_rpc.transports.gloo.addresses import TOKEN_BYTES, Address, AddressExchange

SERVER, WORKER = 0, 1
"""The ranks of the two sides."""
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


class PairLost(Exception):
    """The pair is at its end, or was not made; the message says why. Make another one."""


class Transfer:
    """A message under way: its memory exists, and must be left alone, until `wait` has returned."""

    __slots__ = ("_tensor", "_work")

    def __init__(self, work: Any, tensor: torch.Tensor) -> None:
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

    def receive(self, into: torch.Tensor, tag: int) -> Transfer:
        """Post memory for one message of at most that many bytes; a larger one ends this process.

        Raises:
            PairLost: the pair is at its end.
        """
        try:
            return Transfer(self._group.recv([into], self._other, tag), into)
        except RuntimeError as error:
            raise PairLost(_reason(error)) from None

    def send(self, tensor: torch.Tensor, tag: int) -> Transfer:
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
    store = AddressExchange(rank, token, exchange)
    try:
        group = _connected_group(store, rank, host, token, timedelta(seconds=timeout_seconds))
    except (RuntimeError, PairLost) as error:
        if store.failure is not None:
            raise store.failure from None
        reason = str(error) if isinstance(error, PairLost) else _reason(error)
        if reason == NOTHING_CAME:
            reason = f"no connection within {timeout_seconds:g} s: the ports of both sides have to be open to one another"
        raise PairLost(reason) from None
    return Pair(group, rank, _connections_between(store.own, store.other))


def _connected_group(store: AddressExchange, rank: int, host: str, token: str, timeout: timedelta) -> Any:
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
