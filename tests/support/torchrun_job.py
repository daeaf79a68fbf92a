"""A job of torchrun over several nodes of one machine, and the sockets of its processes."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from ormo_rpc.rendezvous.addresses import written
from tests.support.namespaces import Node
from tests.support.processes import PATIENCE_SECONDS, QUIET, ROOT

PORT = 29400
"""Of the rendezvous."""


@dataclass(frozen=True)
class Socket:
    """A TCP socket of a process.

    Attributes:
        pid: The process.
        local: The address that it is bound to.
        port: The port that it is bound to.
        listening: It listens.
    """

    pid: int
    local: str
    port: int
    listening: bool


class TorchrunJob:
    """One torchrun agent on each node, each with ranks of ``launch.py``; a context whose end kills all processes of the nodes.

    Args:
        folder: Receives the run directory ``run`` and what each node says.
        nodes: The nodes; the first one is node 0 of a static rendezvous.
        overrides: Of ``launch.py``.
        rendezvous: ``c10d`` or ``static``.
        host: The node that hosts the store of the rendezvous, for c10d; by default the first.
        ranks: The number of ranks of each node.
        interface: The number of the interface between the nodes.
        options: Further options of torchrun.
        env: Variables beside those of the tests.
    """

    def __init__(
        self,
        folder: Path,
        nodes: Sequence[Node],
        overrides: Sequence[str],
        *,
        rendezvous: str = "c10d",
        host: int = 0,
        ranks: Sequence[int],
        interface: int = 0,
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        self.nodes = nodes
        self.agents: dict[str, subprocess.Popen[bytes]] = {}
        self._started: list[subprocess.Popen[bytes]] = []
        self._ranks = ranks
        self._rendezvous = rendezvous
        self._host = host
        self._interface = interface
        self._options = options
        self._env = {"ORMO_RPC_SECRET": "of several nodes, for a test", "PYTHONUNBUFFERED": "1", **(env or {})}
        self._overrides = (*QUIET, f"runtime.interface=eth{interface}", f"hydra.run.dir={self.run_dir}", *overrides)

    def __enter__(self) -> Self:
        for node in self.nodes:
            self.start(node)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for node in self.nodes:
            node.kill()
        for process in self._started:
            process.wait(PATIENCE_SECONDS)
        if error is not None:
            error.add_note("\n".join(f"{node.host}: {self.said(node)}" for node in self.nodes))

    def start(self, node: Node) -> None:
        """Start torchrun's agent on a node, and with it the node's ranks."""
        number = self.nodes.index(node)
        address = self.nodes[self._host].addresses[self._interface]
        if self._rendezvous == "static":
            first = self.nodes[0].addresses[self._interface]
            words = [f"--master-addr={first}", f"--master-port={PORT}", f"--node-rank={number}"]
        else:
            is_host = str(number == self._host).lower()
            words = [
                f"--rdzv-endpoint={written(address, PORT)}",
                "--rdzv-backend=c10d",
                f"--rdzv-conf=is_host={is_host},last_call_timeout=15",
            ]
        if not any(option.startswith("--nnodes") for option in self._options):
            words.append(f"--nnodes={len(self.nodes)}")
        words += [f"--nproc-per-node={self._ranks[number]}", f"--local-addr={node.addresses[self._interface]}", *self._options]
        self.agents[node.host] = self.command(node, "-m", "torch.distributed.run", *words, "launch.py", *self._overrides)

    def command(self, node: Node, *words: str) -> subprocess.Popen[bytes]:
        """Start Python on a node; its output goes to the node's file."""
        with self.log(node).open("ab") as log:
            process = subprocess.Popen(
                [*node.own_prefix, sys.executable, *words],
                cwd=ROOT,
                env={**os.environ, **self._env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def log(self, node: Node) -> Path:
        """The file with what a node's processes say."""
        return self.folder / f"{node.host}.log"

    def said(self, node: Node) -> str:
        """The words of a node's processes so far."""
        return self.log(node).read_text(errors="replace") if self.log(node).exists() else ""

    def wait(self, seconds: float = 2 * PATIENCE_SECONDS) -> list[int]:
        """Wait until all agents have ended; return their exit statuses."""
        deadline = time.monotonic() + seconds
        return [agent.wait(max(0.1, deadline - time.monotonic())) for agent in self.agents.values()]

    def ranks(self, node: Node) -> dict[int, psutil.Process]:
        """The launchers of a node by rank."""
        found: dict[int, psutil.Process] = {}
        for process in processes_of(node, "launch.py"):
            rank = process.environ().get("RANK")
            if rank is not None:
                found.setdefault(int(rank), process)  # what it is about to start looks like it
        return found


def processes_of(node: Node, word: str) -> list[psutil.Process]:
    """The processes of a node that have a word in their command line, without torchrun's agent."""
    found: list[psutil.Process] = []
    for pid in node.pids():
        try:
            process = psutil.Process(pid)
            words = process.cmdline()
        except psutil.NoSuchProcess:
            continue
        if word in words and "torch.distributed.run" not in words:
            found.append(process)
    return found


def sockets_of(node: Node) -> list[Socket]:
    """The TCP sockets of all processes of ours on a node."""
    found: list[Socket] = []
    for process in [*processes_of(node, "launch.py"), *processes_of(node, "ormo_rpc.runtimes.programs.entry_point")]:
        try:
            rows = [row for name in ("tcp", "tcp6") for row in _rows(Path(f"/proc/{process.pid}/net/{name}"))]
            inodes = {str(each.readlink()) for each in Path(f"/proc/{process.pid}/fd").iterdir()}
        except OSError:  # it has just ended
            continue
        for row in rows:
            if f"socket:[{row[9]}]" in inodes:
                address, _, port = row[1].partition(":")
                found.append(Socket(process.pid, _address(address), int(port, 16), row[3] == "0A"))
    return found


def _rows(table: Path) -> list[list[str]]:
    return [line.split() for line in table.read_text().splitlines()[1:]]


def _address(digits: str) -> str:
    """The address in Linux's tables, in which each word of 32 bits has the byte order of the machine."""
    packed = b"".join(struct.pack("=I", int(digits[at : at + 8], 16)) for at in range(0, len(digits), 8))
    if len(packed) == 4:
        return socket.inet_ntoa(packed)
    address = ipaddress.IPv6Address(packed)
    return str(address.ipv4_mapped or address)
