"""The systems that `side_by_side` compares, each run as a process of its own that prints its measurement as JSON."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measuring import ROOT
from benchmarks.namespaces import INTERFACE, Host
from benchmarks.peers.harness import HOST_VARIABLE, WORKERS_VARIABLE
from benchmarks.peers.rpc_flat import ONLY_TCP

TIMEOUT_SECONDS = 240.0
KILLED_SECONDS = 10.0
"""Time-out for a killed process to end."""
TORCHRUN_PORT = 29400
"""Of torchrun's store on the first host, in a namespace of its own where no other process listens."""
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "TP_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
MARK = "ORMO_RPC_BENCHMARK"
"""Environment variable of all processes of one measurement, by which they are found and killed in the end."""
OWN_ENVIRONMENTS = {name: ROOT / f".venv-{name}" for name in ("ray", "tensorflow")}
"""Virtual environments of peers that cannot share ours, made by ``make bench-NAME``."""


@dataclass(frozen=True, kw_only=True)
class System:
    """One of the systems compared, and its command.

    Attributes:
        name: In tables.
        module: Run by ``python -m``.
        arguments: Besides D, K and S.
        environment: The folder of its own virtual environment; None for ours.
        ours: It takes overrides, and between hosts torchrun starts it on each, where rank 0 measures; a peer moves its workers.
        variables: Further environment variables.
        overhead_seconds: Its time besides S on two cores, roughly: nearly all of it is loading libraries.
    """

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    environment: Path | None = None
    ours: bool = False
    variables: tuple[tuple[str, str], ...] = ()
    overhead_seconds: float = 5.0

    @property
    def python(self) -> Path:
        """The interpreter."""
        return Path(sys.executable) if self.environment is None else self.environment / "bin" / "python"


def _ours(name: str, *arguments: str) -> System:
    options: dict[str, Any] = {"ours": True, "overhead_seconds": 10.0}
    return System(name=name, module="benchmarks.throughput", arguments=("--json", *arguments), **options)


def _peer(name: str, module: str = "", **options: Any) -> System:
    return System(name=name, module=f"benchmarks.peers.{module or name}", **options)


RAW_SOCKETS, RPC_TENSORS = "raw_sockets", "rpc_tensors"
"""The two baselines: what one would write by hand, and what PyTorch's own example does."""
SYSTEMS = {
    c.name: c
    for c in (
        _ours("ormo_rpc"),
        _ours("ormo_rpc_gloo", "--transport", "gloo"),
        _ours("ormo_rpc_tcp", "--transport", "tcp"),
        _ours("ormo_rpc_inline", "--transport", "rpc"),
        _ours("ormo_rpc_tcp_bf16", "--transport", "tcp", "--wire", "bf16"),
        _ours("ormo_rpc_inline_bf16", "--transport", "rpc", "--wire", "bf16"),
        _peer(RAW_SOCKETS),
        _peer(RPC_TENSORS),
        _peer("rpc_flat"),
        _peer("rpc_flat_huge", "rpc_flat", variables=(("THP_MEM_ALLOC_ENABLE", "1"),)),
        _peer("rpc_flat_tcp", "rpc_flat", variables=((ONLY_TCP, "1"),)),
        _peer("gloo"),
        _peer("ray", "ray_server", environment=OWN_ENVIRONMENTS["ray"], overhead_seconds=10.0),
        _peer("tensorflow", "tensorflow_server", environment=OWN_ENVIRONMENTS["tensorflow"], overhead_seconds=13.0),
    )
}
DEFAULT = tuple(name for name in SYSTEMS if name != "rpc_flat_huge")
BETWEEN_HOSTS = (RAW_SOCKETS, "ormo_rpc_gloo", "ormo_rpc_tcp", "ormo_rpc_inline", "gloo", "rpc_flat_tcp")
"""The systems that can be measured between two hosts."""


def run(
    system: System, parameters: int, workers: int, seconds: float, hosts: tuple[Host, Host] | None = None
) -> dict[str, Any] | str:
    """Measure a system, or return the reason why there is no measurement; no process of it is left.

    Args:
        system: What to measure.
        parameters: D.
        workers: K.
        seconds: Time that is measured.
        hosts: The server's host, and the workers'; None for all on this one.
    """
    if not system.python.exists():
        return f"not installed: make bench-{system.name}"
    return _measurement(*commands_of(system, parameters, workers, seconds, hosts))


def commands_of(
    system: System,
    parameters: int,
    workers: int,
    seconds: float,
    hosts: tuple[Host, Host] | None,
    folder: Path = ROOT,
    overrides: Sequence[str] = (),
) -> tuple[list[list[str]], dict[str, str]]:
    """The commands that measure a system together, the first of which prints the measurement, and their environment.

    Args:
        system: What to measure.
        parameters: D.
        workers: K.
        seconds: Time that is measured.
        hosts: The server's host, and the workers'; None for all on this one.
        folder: The checkout.
        overrides: Further ones of our runs.
    """
    overrides = [*overrides, *([] if hosts is None else [f"runtime.interface={INTERFACE}"])]
    more = ["--set", *overrides] if system.ours and overrides else []
    size = ("--parameters", str(parameters), "--workers", str(workers), "--seconds", str(seconds))
    command = ["-m", system.module, *size, *system.arguments, *more]
    python, variables = str(system.python), {**os.environ, "PYTHONPATH": str(folder), **dict(system.variables)}
    if hosts is None:
        return [[python, *command]], {**variables, **LOOPBACK}
    server, others = hosts
    variables |= {"GLOO_SOCKET_IFNAME": INTERFACE, "TP_SOCKET_IFNAME": INTERFACE, "MASTER_ADDR": server.address}
    if not system.ours:
        variables |= {HOST_VARIABLE: server.address, WORKERS_VARIABLE: others.name}
        return [[*server.prefix, python, *command]], variables
    torchrun = [python, "-m", "torch.distributed.run", "--nnodes=2", f"--master-addr={server.address}"]
    torchrun.append(f"--master-port={TORCHRUN_PORT}")
    commands = [
        [*host.prefix, *torchrun, f"--node-rank={rank}", f"--nproc-per-node={processes}", *command]
        for rank, (host, processes) in enumerate(((server, 1), (others, workers)))
    ]
    return commands, {**variables, "ORMO_RPC_SECRET": secrets.token_hex(32)}


def _measurement(commands: Sequence[list[str]], variables: dict[str, str]) -> dict[str, Any] | str:
    """Run commands together; the first one prints the measurement."""
    with contextlib.ExitStack() as stack:
        process, *_ = [stack.enter_context(started(command, variables)) for command in commands]
        try:
            out, err = process.communicate(timeout=TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            return f"no answer within {TIMEOUT_SECONDS:g} seconds"
    lines = (out if process.returncode == 0 else err).strip().splitlines() or ["no output"]
    if process.returncode != 0:
        return f"{lines[-1]} (exit status {process.returncode})"
    try:
        return json.loads(lines[-1])
    except ValueError:
        return f"got {lines[-1]!r}, expected a measurement as JSON"


@contextlib.contextmanager
def started(
    command: list[str], variables: dict[str, str], folder: Path = ROOT, mark: str = ""
) -> Generator[subprocess.Popen[str]]:
    """Start a process; it and everything it has started, daemons too, are killed at the end of the context."""
    mark = mark or secrets.token_hex(8)
    process = subprocess.Popen(
        command, cwd=folder, env={**variables, MARK: mark}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        for member in marked(mark):
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.kill()
        process.communicate(timeout=KILLED_SECONDS)


def marked(mark: str) -> list[psutil.Process]:
    """The processes with this mark in their environment."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                found.append(process)
    return found
