"""Addresses of the listener: on loopback by default, and reachable from everywhere only where ``server.public`` says so."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct

from ormo_rpc.errors import ConfigError

_SIOCGIFADDR = 0x8915
"""Linux: the ioctl for the address of an interface."""


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
