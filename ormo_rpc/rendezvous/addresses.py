"""Addresses of the listener: on loopback by default, and reachable from everywhere only where ``server.public`` says so."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

from ormo_rpc.errors import ConfigError

_SIOCGIFADDR = 0x8915
"""Linux: the ioctl for the address of an interface."""
_IPV6_ADDRESSES = Path("/proc/net/if_inet6")
"""Linux: a line for each address of IPv6, which ends in the interface."""


def listen_at(address: str, *, public: bool) -> socket.socket:
    """Listen at HOST:PORT; port 0 for any free one.

    Raises:
        ConfigError: the address is malformed, cannot be bound, or is reachable from everywhere and ``public`` is not set.
    """
    host, port = parse_address(address)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        ip = ipaddress.ip_address(found[4][0])
        if not public and (ip.is_global or ip.is_unspecified):
            raise ConfigError(
                f"server.address: got {address}, reachable from everywhere; name an address of a private network, or "
                f"set server.public=true after reading SECURITY.md"
            )
        return socket.create_server(found[4][:2], family=found[0], backlog=128)
    except OSError as error:
        raise ConfigError(f"server.address: got {address}, where the server cannot listen: {error.strerror or error}") from None


def parse_address(address: str) -> tuple[str, int]:
    """Split HOST:PORT; a host of IPv6 is in brackets, as in ``[::1]:2947``.

    Raises:
        ConfigError: it is of another form.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"server.address: got {address!r}, expected HOST:PORT")
    return host.strip("[]"), int(port)


def address_of(listener: socket.socket) -> str:
    """HOST:PORT of a listening socket, as `parse_address` reads it."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def interface_address(interface: str | None) -> str:
    """The IPv4 address of a network interface.

    Raises:
        ConfigError: there is no such interface, it has no address, or none was named.
    """
    names = [name for _, name in socket.if_nameindex()]
    if interface is None or interface not in names:
        raise ConfigError(
            f"runtime.interface: got {interface}, expected the interface between the machines, one of {', '.join(names)}"
        )
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError as error:
            raise ConfigError(f"runtime.interface: got {interface}, which has no address: {error.strerror}") from None
    return socket.inet_ntoa(answer[20:24])


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
        ConfigError: no interface has that address as its first one, in which those of IPv4 come before those of IPv6.
    """
    wanted = _parsed(host)
    for _, name in socket.if_nameindex():
        with contextlib.suppress(ConfigError):
            found = _parsed(interface_address(name))
            if found == wanted or (found.is_loopback and wanted.is_loopback):
                return name
    with contextlib.suppress(OSError), _IPV6_ADDRESSES.open() as lines:
        for line in lines:
            digits, *_, name = line.split()
            if ipaddress.IPv6Address(bytes.fromhex(digits)) == wanted and not _has_ipv4(name):
                return name
    raise ConfigError(
        f"server.address: no network interface of this machine has the first address {host}, where torch's agent is to listen; "
        f"name one that has, or use transport=tcp, which needs no agent"
    )


def _has_ipv4(interface: str) -> bool:
    """Tell whether an interface has an address of IPv4, which comes before those of IPv6."""
    with contextlib.suppress(ConfigError):
        interface_address(interface)
        return True
    return False


def specific_address(host: str) -> str:
    """An address that others can reach in place of an unspecified one (``0.0.0.0``): that of the default route."""
    if not _parsed(host).is_unspecified:
        return host
    elsewhere = "192.0.2.1"  # of nobody
    found = local_address((elsewhere, 9))
    return "127.0.0.1" if found == elsewhere else found


def _parsed(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An IP address without the scope of IPv6, in the form of IPv4 where it has one."""
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
