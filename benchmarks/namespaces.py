"""Two hosts on one machine: two Linux network namespaces, joined by a pair of virtual interfaces.

The pair has no limit of its own: a byte costs what the system's TCP costs, as on loopback, and no network card nor its
bandwidth is in the figures. The namespaces share this machine's processors, memory and process numbers.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shutil
import subprocess
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "eth0"
"""The name of the interface in both namespaces."""
_count = itertools.count()
"""Of the namespaces of this process, for their names."""
_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True, kw_only=True)
class Host:
    """A network namespace with an address.

    Attributes:
        name: Of the namespace.
        address: Of its interface.
    """

    name: str
    address: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """The beginning of a command that runs on it."""
        return ("ip", "netns", "exec", self.name)


def why_not() -> str | None:
    """The reason why no namespace can be made on this machine; None if there is none before it is tried."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    return None if shutil.which("ip") else "there is no ip command"


@contextlib.contextmanager
def two_hosts() -> Generator[tuple[Host, Host]]:
    """Make two hosts that reach each other; they are removed at the end of the context.

    Raises:
        OSError: they cannot be made; the text says why.
    """
    hosts = tuple(
        Host(name=f"bench{os.getpid()}x{next(_count)}{side}", address=f"10.78.0.{k + 1}") for k, side in enumerate("ab")
    )
    a, b = hosts
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
        _ip("link", "add", INTERFACE, "netns", a.name, "type", "veth", "peer", "name", INTERFACE, "netns", b.name)
        for host in hosts:
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            for device in ("lo", INTERFACE):
                _ip("-n", host.name, "link", "set", device, "up")
        yield a, b
    finally:
        for host in hosts:
            with contextlib.suppress(OSError):
                _ip("netns", "delete", host.name)


def enter(name: str) -> None:
    """Move the calling thread, and the threads and processes that it starts later, into a namespace.

    Raises:
        OSError: it does not exist, or this process may not.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", name).open() as namespace:
        if libc.setns(namespace.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False, timeout=10)  # noqa: S607 - found by PATH
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip() or f'exit status {done.returncode}'}")
