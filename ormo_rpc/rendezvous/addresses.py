"""Where the server listens: on loopback unless another address is named, and never to the world unless that is asked for."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct

from ormo_rpc.errors import ConfigError

_SIOCGIFADDR = 0x8915
"""Linux: ask for the address of an interface."""


def bound(address: str, *, public: bool) -> socket.socket:
    """A socket that listens at HOST:PORT; port 0 for any free one.

    Raises:
        ConfigError: the address is no such thing, cannot be bound, or is reachable from everywhere and ``public`` is not set.
    """
    host, port = parse(address)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        ip = ipaddress.ip_address(found[4][0])
        if not public and (ip.is_global or ip.is_unspecified):
            raise ConfigError(
                f"server.address: got {address}, which is open to the world; name an address of a private network, or set "
                f"server.public=true after reading SECURITY.md"
            )
        return socket.create_server(found[4][:2], family=found[0], backlog=128)
    except OSError as error:
        raise ConfigError(f"server.address: got {address}, where one cannot listen: {error.strerror or error}") from None


def parse(address: str) -> tuple[str, int]:
    """ServerProcess and port of HOST:PORT; the host of IPv6 in brackets, as in ``[::1]:2947``.

    Raises:
        ConfigError: it is not of that form.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"server.address: got {address!r}, expected HOST:PORT")
    return host.strip("[]"), int(port)


def name_of(listener: socket.socket) -> str:
    """HOST:PORT of a listening socket, as `parse` reads it."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def interface_address(interface: str | None) -> str:
    """The address of a network interface.

    Raises:
        ConfigError: there is none, or none was named.
    """
    names = [name for _, name in socket.if_nameindex()]
    if interface is None or interface not in names:
        raise ConfigError(
            f"runtime.interface: got {interface}, expected the interface between the machines, one of {', '.join(names)}"
        )
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            answer = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError as error:
            raise ConfigError(f"runtime.interface: got {interface}, which has no address: {error.strerror}") from None
    return socket.inet_ntoa(answer[20:24])
