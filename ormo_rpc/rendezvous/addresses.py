"""Addresses of the listener: on loopback by default, and reachable from everywhere only where ``server.public`` says so."""

from __future__ import annotations

import ipaddress
import socket

from ormo_rpc.errors import ConfigError

MAX_PORT = 65535


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
    written, _, port = address.rpartition(":")
    host = written[1:-1] if written[:1] + written[-1:] == "[]" else written
    if not host or not port.isdecimal() or int(port) > MAX_PORT or set(host) & set("[]"):
        raise ConfigError(f"server.address: got {address!r}, expected HOST:PORT")
    if host == written and ":" in host:
        raise ConfigError(f"server.address: got {address!r}, expected [HOST]:PORT, as a host of IPv6 has to be in brackets")
    return host, int(port)


def written(host: str, port: int) -> str:
    """HOST:PORT, as `parse_address` reads it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def master_address(host: str, port: str, advice: str) -> str:
    """HOST:PORT of rank 0's machine, by the variables MASTER_ADDR and MASTER_PORT that launchers set.

    Args:
        host: The value of the former.
        port: The value of the latter.
        advice: What to do where they are wrong.

    Raises:
        ConfigError: one of them is of another form.
    """
    if not host or set(host) & set("[]"):
        expected = "a host, an address of IPv6 without brackets"
        raise ConfigError(f"MASTER_ADDR: got {host!r} in the environment, expected {expected}; {advice}")
    if not (port.isascii() and port.isdecimal() and 0 < int(port) <= MAX_PORT):
        raise ConfigError(f"MASTER_PORT: got {port!r} in the environment, expected a port of rank 0's host; {advice}")
    return written(host, int(port))


def address_of(listener: socket.socket) -> str:
    """HOST:PORT of a listening socket."""
    return written(*listener.getsockname()[:2])
