"""Nodes for tests: Linux network namespaces with addresses of their own, joined by bridges, each with a host name of its own.

The bridges are in a namespace of their own, so that nothing of the machine's network changes.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import itertools
import os
import shutil
import signal
import subprocess
from dataclasses import dataclass
from typing import Self

import psutil

NETWORKS = {
    4: (ipaddress.ip_network("10.77.0.0/24"), ipaddress.ip_network("10.78.0.0/24")),
    6: (ipaddress.ip_network("fd77::/64"), ipaddress.ip_network("fd78::/64")),
}
"""Of the interfaces ``eth0``, on which the first node has the lowest address, and ``eth1``, on which it has the highest."""
_FIREWALL, _LOCAL = 10, 20
"""The places of rules for routes: dropped ports come before the addresses of the node itself."""
_COMMAND_SECONDS = 10.0
_count = itertools.count()
"""Of the `Nodes` of this process, for their names."""
_NAMED = 'hostname "$0"; exec "$@"'
"""A shell command that gives the process a host name; no name service knows it."""


@dataclass(frozen=True)
class Node:
    """A namespace that stands for a machine.

    Attributes:
        namespace: The name of its network namespace.
        host: Its host name, which does not resolve.
        addresses: Its addresses, on the interfaces ``eth0``, ``eth1`` and so on.
    """

    namespace: str
    host: str
    addresses: tuple[str, ...]

    @property
    def address(self) -> str:
        """Its address on ``eth0``."""
        return self.addresses[0]

    @property
    def prefix(self) -> tuple[str, ...]:
        """The words that the commands of its processes begin with; they see the processes of the whole machine."""
        return self._prefix()

    @property
    def own_prefix(self) -> tuple[str, ...]:
        """As `prefix`, for processes that see their own children alone, so that nodes cannot share memory."""
        return self._prefix("--pid", "--fork", "--kill-child", "--mount-proc")

    def _prefix(self, *unshared: str) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.namespace, "unshare", "--uts", *unshared, "sh", "-c", _NAMED, self.host)

    def pids(self) -> list[int]:
        """The processes that run in it."""
        found = subprocess.run(
            ["ip", "netns", "pids", self.namespace],  # noqa: S607 - found by PATH
            capture_output=True,
            text=True,
            check=False,
            timeout=_COMMAND_SECONDS,
        )
        return [int(pid) for pid in found.stdout.split()]

    def kill(self) -> None:
        """End all its processes at once, as a power failure would; return when they have ended."""
        killed: list[psutil.Process] = []
        while pids := [pid for pid in self.pids() if _runs(pid)]:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                    killed.append(psutil.Process(pid))
                    os.kill(pid, signal.SIGKILL)
            psutil.wait_procs(killed, _COMMAND_SECONDS)


class Nodes:
    """Namespaces on one bridge for each interface; a context whose end kills the processes inside and removes them.

    Args:
        count: The number of nodes.
        interfaces: The number of interfaces of each.
        version: 4, or 6 for addresses of IPv6 alone.

    Raises:
        OSError: on entering, where this machine lets no namespace be made.
    """

    def __init__(self, count: int, *, interfaces: int = 1, version: int = 4) -> None:
        tag = f"nodes{os.getpid()}x{next(_count)}"
        self._switch = f"{tag}switch"
        self._interfaces = interfaces
        self._networks = NETWORKS[version]
        first, second = self._networks
        self.nodes = [
            Node(f"{tag}{letter}", f"node-{letter}", (str(first[number]), str(second[9 - number]))[:interfaces])
            for number, letter in enumerate("abcdefgh"[:count], 1)
        ]

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            node.kill()
        for name in (*(node.namespace for node in self.nodes), self._switch):
            with contextlib.suppress(OSError):  # it was never made
                command("ip", "netns", "delete", name)

    def link(self, node: Node, *, up: bool) -> None:
        """Take the cable of a node's ``eth0`` out, or put it back."""
        command("ip", "-n", self._switch, "link", "set", _port(node, 0), "up" if up else "down")

    def drop(self, node: Node, ports: tuple[int, int] | None) -> None:
        """Drop all that comes to a range of a node's ports, in place of the range before; None for no range.

        It is done by a rule for routes, since these need no further program.
        """
        rules = ("ip", f"-{self._networks[0].version}", "-n", node.namespace, "rule")
        with contextlib.suppress(OSError):  # there was none
            command(*rules, "delete", "pref", str(_FIREWALL))
        if ports is None:
            return
        with contextlib.suppress(OSError):  # it was done for an earlier range
            command(*rules, "add", "pref", str(_LOCAL), "table", "local")
            command(*rules, "delete", "pref", "0")
        dropped = ("iif", "eth0", "ipproto", "tcp", "dport", f"{ports[0]}-{ports[1]}")
        command(*rules, "add", "pref", str(_FIREWALL), *dropped, "blackhole")

    def set_port_range(self, first: int, last: int) -> None:
        """Set the ports that the nodes choose from where a program asks for any free one."""
        for node in self.nodes:
            setting = f"echo {first} {last} > /proc/sys/net/ipv4/ip_local_port_range"
            command("ip", "netns", "exec", node.namespace, "sh", "-c", setting)

    def _make(self) -> None:
        for name in (self._switch, *(node.namespace for node in self.nodes)):
            command("ip", "netns", "add", name)
            command("ip", "-n", name, "link", "set", "lo", "up")
        for number in range(self._interfaces):
            bridge, interface = f"bridge{number}", f"eth{number}"
            command("ip", "-n", self._switch, "link", "add", bridge, "type", "bridge")
            command("ip", "-n", self._switch, "link", "set", bridge, "up")
            for node in self.nodes:
                port = _port(node, number)
                ends = ("link", "add", interface, "netns", node.namespace, "type", "veth", "peer", "name", port)
                command("ip", *ends, "netns", self._switch)
                command("ip", "-n", self._switch, "link", "set", port, "master", bridge, "up")
                network = self._networks[number]
                address = f"{node.addresses[number]}/{network.prefixlen}"
                at_once = ["nodad"] if network.version == 6 else []
                command("ip", "-n", node.namespace, "address", "add", address, "dev", interface, *at_once)
                command("ip", "-n", node.namespace, "link", "set", interface, "up")


def why_none() -> str | None:
    """The reason why this machine lets no namespace be made; None where it does."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program in ("ip", "unshare", "hostname"):
        if shutil.which(program) is None:
            return f"there is no {program} command"
    return _why_refused()


@functools.cache
def _why_refused() -> str | None:
    try:
        with Nodes(1):
            return None
    except OSError as error:
        return str(error)


def command(*words: str) -> None:
    """Run a command.

    Raises:
        OSError: it failed; the text says why.
    """
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=_COMMAND_SECONDS)
    if done.returncode != 0:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip() or f'exit status {done.returncode}'}")


def _port(node: Node, interface: int) -> str:
    """The name of the bridge's end of a node's cable."""
    return f"{node.host}{interface}"


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
