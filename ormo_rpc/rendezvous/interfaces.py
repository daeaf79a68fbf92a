"""Network interfaces of this machine, and the addresses that they have."""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Generator, Iterator

from ormo_rpc.errors import ConfigError

IP = ipaddress.IPv4Address | ipaddress.IPv6Address

_GETADDR, _NEWADDR = 22, 20
"""Linux: the kinds of netlink's messages: a request for all addresses, and one of them; another kind ends the answer."""
_REQUEST_ALL = 0x301
"""Linux: the flags of a request for all there are."""
_FIELDS: dict[int, int] = {socket.AF_INET: 2, socket.AF_INET6: 1}
"""Linux: the field of such a message with the interface's own address, by family."""
_CHUNK_BYTES = 64 * 1024
_ANSWER_SECONDS = 5.0
"""The kernel answers at once."""


def interface_address(interface: str | None) -> str:
    """The first address of a network interface; those of IPv4 come before those of IPv6, as for torch's agent.

    Raises:
        ConfigError: there is no such interface, it has no address, or none was named.
    """
    names = [name for _, name in socket.if_nameindex()]
    if interface is None or interface not in names:
        raise ConfigError(
            f"runtime.interface: got {interface}, expected the interface between the machines, one of {', '.join(names)}"
        )
    first = _first_addresses().get(interface)
    if first is None:
        raise ConfigError(
            f"runtime.interface: got {interface}, which has no address (one of IPv6 that begins with fe80 does not count, as "
            f"it is valid on one link alone)"
        )
    return str(first)


def local_address(server: tuple[str, int]) -> str:
    """The address of this machine from which packets to a server leave; the server's host where there is no way to it."""
    try:
        family, *_, target = socket.getaddrinfo(*server, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return server[0]


def interface_of(host: str) -> str:
    """The network interface of an IP address of this machine; an address of loopback belongs to the loopback interface.

    Raises:
        ConfigError: no interface has that address as its first one.
    """
    wanted = parsed(host)
    for name, first in _first_addresses().items():
        if first == wanted or (first.is_loopback and wanted.is_loopback):
            return name
    raise ConfigError(
        f"server.address: no network interface of this machine has the first address {host}, where torch's agent is to listen; "
        f"name one that has, or use transport=tcp, which needs no agent"
    )


def specific_address(host: str) -> str:
    """An address that others can reach in place of an unspecified one (``0.0.0.0``, ``::``): that of the default route.

    It is one of IPv6 where there is no route for IPv4, as torch's agent listens on the first address of an interface alone.
    """
    if not parsed(host).is_unspecified:
        return host
    for nobody in ("192.0.2.1", "2001:db8::1"):
        found = local_address((nobody, 9))
        if found != nobody:
            return found
    return "127.0.0.1"


def parsed(host: str) -> IP:
    """An IP address without the scope of IPv6, in the form of IPv4 where it has one.

    Raises:
        ValueError: it is a name.
    """
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def is_loopback(host: str) -> bool:
    """Tell whether a host is this machine alone, by its address or its usual name; False for any other name."""
    try:
        return host == "localhost" or parsed(host).is_loopback
    except ValueError:
        return False


def _first_addresses() -> dict[str, IP]:
    """The first address of each interface that has one."""
    found: dict[str, IP] = {}
    for name, address in sorted(_addresses(), key=lambda each: each[1].version):  # stable
        if not address.is_link_local or address.version == 4:
            found.setdefault(name, address)
    return found


def _addresses() -> Generator[tuple[str, IP]]:
    """Each interface with each of its addresses, in the system's order; none where the system is not Linux."""
    if not hasattr(socket, "AF_NETLINK"):
        return
    names = dict(socket.if_nameindex())
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as kernel:
        kernel.settimeout(_ANSWER_SECONDS)
        kernel.send(struct.pack("=IHHIIB7x", 24, _GETADDR, _REQUEST_ALL, 1, 0, socket.AF_UNSPEC))
        for kind, message in _messages(kernel):
            if kind != _NEWADDR:
                return
            family, index = struct.unpack_from("=B3xI", message)
            packed = dict(_attributes(message[8:])).get(_FIELDS.get(family, 0))
            if packed is not None and index in names:
                yield names[index], ipaddress.ip_address(packed)


def _messages(kernel: socket.socket) -> Iterator[tuple[int, bytes]]:
    """The kind and the content of each message of netlink's, which come several at a time."""
    while True:
        chunk = kernel.recv(_CHUNK_BYTES)
        while chunk:
            size, kind = struct.unpack_from("=IH", chunk)
            yield kind, chunk[16:size]
            chunk = chunk[-(-size // 4) * 4 :]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The number and the value of each field of a message of netlink's."""
    while len(data) >= 4:
        size, number = struct.unpack_from("=HH", data)
        yield number, data[4:size]
        data = data[-(-size // 4) * 4 :]
