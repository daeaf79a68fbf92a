"""A network that can be cut: two Linux network namespaces joined by a pair of virtual interfaces."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Namespace:
    """A network namespace that processes run in; by default that of this process.

    Attributes:
        prefix: What their commands begin with.
        overrides: Of ``launch.py``, which have to come with it.
        name: Its name; None for that of this process.
    """

    prefix: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    name: str | None = None

    def tcp_table(self) -> str:
        """The TCP sockets of this namespace, as Linux lists them; empty if it does not exist."""
        files = ("/proc/net/tcp", "/proc/net/tcp6")
        return subprocess.run([*self.prefix, "cat", *files], capture_output=True, text=True, check=False, timeout=10).stdout


class Network:
    """Two namespaces, ``inside`` for the run and ``outside`` for an elastic worker; a context manager that removes them.

    Packets are lost by ``tc netem`` if the kernel has it; otherwise the interface of ``outside`` is taken down.

    Attributes:
        inside: The namespace of the server.
        outside: The other one.
        netem: Packets are lost by ``tc netem``.
    """

    ADDRESS = "10.77.0.1"

    def __init__(self) -> None:
        tag = f"chaos{os.getpid()}"
        self._names = (f"{tag}a", f"{tag}b")
        self.inside, self.outside = (
            Namespace(("ip", "netns", "exec", name), (f"runtime.interface={name}", "transport=rpc"), name)
            for name in self._names
        )
        self.netem = False

    @staticmethod
    def why_not() -> str | None:
        """The reason why no namespace can be made on this machine; None if there is none before it is tried."""
        if os.geteuid() != 0:
            return "network namespaces need root"
        return None if shutil.which("ip") else "there is no ip command"

    def __enter__(self) -> Self:
        a, b = self._names
        try:
            for name in self._names:
                _run("ip", "netns", "add", name)
            _run("ip", "link", "add", a, "netns", a, "type", "veth", "peer", "name", b, "netns", b)
            for name, address in ((a, self.ADDRESS), (b, "10.77.0.2")):
                _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", name)
                for device in ("lo", name):
                    _run("ip", "-n", name, "link", "set", device, "up")
        except BaseException:
            self.__exit__()
            raise
        self.netem = self._can_lose_packets()
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False, timeout=10)  # noqa: S607 - found by PATH

    def lose(self) -> None:
        """Lose every packet from now on, in both directions."""
        if self.netem:
            for name in self._names:
                _run("tc", "-n", name, "qdisc", "add", "dev", name, "root", "netem", "loss", "100%")
        else:
            _run("ip", "-n", self._names[1], "link", "set", self._names[1], "down")

    def restore(self) -> None:
        """Deliver packets again."""
        if self.netem:
            for name in self._names:
                _run("tc", "-n", name, "qdisc", "delete", "dev", name, "root")
        else:
            _run("ip", "-n", self._names[1], "link", "set", self._names[1], "up")

    def _can_lose_packets(self) -> bool:
        name = self._names[1]
        if shutil.which("tc") is None:
            return False
        try:
            _run("tc", "-n", name, "qdisc", "add", "dev", name, "root", "netem", "loss", "100%")
        except OSError:
            return False
        _run("tc", "-n", name, "qdisc", "delete", "dev", name, "root")
        return True


def _run(*command: str) -> None:
    """Run a command.

    Raises:
        OSError: it failed; the text says why.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    if done.returncode != 0:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip() or f'exit status {done.returncode}'}")
