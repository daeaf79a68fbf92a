"""Addresses of the two sides of a pair, and the exchange of them, in the place of a server of stores."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage] # documented, not annotated as public
from typing_extensions import override

TOKEN_BYTES = 16
_SOCKADDR = 128
"""Bytes of an address in the words of the system (sockaddr_storage)."""
_IN_SOCKADDR: dict[int, tuple[int, int]] = {socket.AF_INET: (4, 4), socket.AF_INET6: (8, 16)}
"""The place and the bytes of the host in it, by family; the port stands at 2."""


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


class AddressExchange(Store):
    """Stands in the place of a store between the two sides of a pair: each side's value is made of its address.

    Args:
        rank: This side's.
        token: Of its address.
        exchange: Given this side's address, returns that of the other side; it may wait for it.

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
        pass  # `get` waits

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
