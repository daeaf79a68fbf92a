"""A network of our own that can fail: two namespaces of Linux, joined by a pair of virtual interfaces."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class ServerArgs:
    """Where processes run.

    Attributes:
        prefix: What their commands begin with.
        overrides: Of ``launch.py``, which have to come with it.
        namespace: Its name; None for that of this process.
    """

    prefix: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    namespace: str | None = None

    def table(self) -> str:
        """The TCP sockets of this place, as Linux lists them."""
        files = ("/proc/net/tcp", "/proc/net/tcp6")
        return subprocess.run([*self.prefix, "cat", *files], capture_output=True, text=True, check=False, timeout=10).stdout


class Network:
    """Two namespaces, ``inside`` with the server and ``outside`` with a guest; use it as a context, whose end removes them.

    The loss of every packet is that of ``tc netem`` where the kernel has it; else the interface of ``outside`` is taken down.
    """

    ADDRESS = "10.77.0.1"

    def __init__(self) -> None:
        tag = f"chaos{os.getpid()}"
        self._names = (f"{tag}a", f"{tag}b")
        self.inside, self.outside = (
            ServerArgs(("ip", "netns", "exec", name), (f"runtime.interface={name}", "wire.transport=uv"), name)
            for name in self._names
        )
        self.netem = False

    @staticmethod
    def why_not() -> str | None:
        """Why it cannot be had here; None where it can, as far as one sees without trying."""
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
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False, timeout=10)  # noqa: S607 - wherever it is

    def lose(self) -> None:
        """Lose everything from now on, in both directions."""
        if self.netem:
            for name in self._names:
                _run("tc", "-n", name, "qdisc", "add", "dev", name, "root", "netem", "loss", "100%")
        else:
            _run("ip", "-n", self._names[1], "link", "set", self._names[1], "down")

    def restore(self) -> None:
        """Let everything through again."""
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
