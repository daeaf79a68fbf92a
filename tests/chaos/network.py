"""A network that can be cut: two Linux network namespaces, one for the run and one for an elastic worker."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from typing import Self

from tests.support.namespaces import Node, Nodes, command


@dataclass(frozen=True)
class Namespace:
    """A network namespace that processes run in; by default that of this process.

    Attributes:
        prefix: What their commands begin with.
        name: Its name; None for that of this process.
    """

    prefix: tuple[str, ...] = ()
    name: str | None = None

    @classmethod
    def of(cls, node: Node) -> Namespace:
        """The namespace of a node."""
        return cls(node.prefix, node.namespace)

    def tcp_table(self) -> str:
        """The TCP sockets of this namespace, as Linux lists them; empty if it does not exist."""
        files = ("/proc/net/tcp", "/proc/net/tcp6")
        return subprocess.run([*self.prefix, "cat", *files], capture_output=True, text=True, check=False, timeout=10).stdout


class Network:
    """Two namespaces, ``inside`` for the run and ``outside`` for an elastic worker; a context manager that removes them.

    Packets are lost by ``tc netem`` if the kernel has it; otherwise the link of ``outside`` is taken down.

    Attributes:
        inside: The namespace of the server.
        outside: The other one.
        address: Of the server.
        netem: Packets are lost by ``tc netem``.
    """

    def __init__(self) -> None:
        self._nodes = Nodes(2)
        self.inside, self.outside = map(Namespace.of, self._nodes.nodes)
        self.address = self._nodes.nodes[0].address
        self.netem = False

    def __enter__(self) -> Self:
        self._nodes.__enter__()
        self.netem = self._can_lose_packets()
        return self

    def __exit__(self, *_: object) -> None:
        self._nodes.__exit__()

    def lose(self) -> None:
        """Lose every packet from now on, in both directions."""
        if self.netem:
            for node in self._nodes.nodes:
                _netem(node, "add")
        else:
            self._nodes.link(self._nodes.nodes[1], up=False)

    def restore(self) -> None:
        """Deliver packets again."""
        if self.netem:
            for node in self._nodes.nodes:
                _netem(node, "delete")
        else:
            self._nodes.link(self._nodes.nodes[1], up=True)

    def _can_lose_packets(self) -> bool:
        node = self._nodes.nodes[1]
        if shutil.which("tc") is None:
            return False
        try:
            _netem(node, "add")
        except OSError:
            return False
        _netem(node, "delete")
        return True


def _netem(node: Node, action: str) -> None:
    loss = ("netem", "loss", "100%") if action == "add" else ()
    command("tc", "-n", node.namespace, "qdisc", action, "dev", "eth0", "root", *loss)
