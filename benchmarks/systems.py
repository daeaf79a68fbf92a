"""The systems that `side_by_side` compares, each run as a process of its own that prints its measurement as JSON."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measuring import ROOT
from benchmarks.peers.rpc_flat import ONLY_TCP

TIMEOUT_SECONDS = 240.0
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
        variables: Further environment variables.
        overhead_seconds: Its time besides S on two cores, roughly: nearly all of it is loading libraries.
    """

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    environment: Path | None = None
    variables: tuple[tuple[str, str], ...] = ()
    overhead_seconds: float = 5.0

    @property
    def python(self) -> Path:
        """The interpreter."""
        return Path(sys.executable) if self.environment is None else self.environment / "bin" / "python"


def _ours(name: str, *arguments: str) -> System:
    return System(name=name, module="benchmarks.throughput", arguments=("--json", *arguments), overhead_seconds=10.0)


def _peer(name: str, module: str = "", **options: Any) -> System:
    return System(name=name, module=f"benchmarks.peers.{module or name}", **options)


RAW_SOCKETS, RPC_TENSORS = "raw_sockets", "rpc_tensors"
"""The two baselines: what one would write by hand, and what PyTorch's own example does."""
SYSTEMS = {
    c.name: c
    for c in (
        _ours("ormo_rpc"),
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


def run(system: System, parameters: int, workers: int, seconds: float) -> dict[str, Any] | str:
    """Measure a system, or return the reason why there is no measurement; no process of it is left."""
    if not system.python.exists():
        return f"not installed: make bench-{system.name}"
    command = [
        *(str(system.python), "-m", system.module, "--parameters", str(parameters), "--workers", str(workers)),
        *("--seconds", str(seconds), *system.arguments),
    ]
    variables = {**os.environ, **LOOPBACK, "PYTHONPATH": str(ROOT), **dict(system.variables)}
    with started(command, variables) as process:
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
def started(command: list[str], variables: dict[str, str], folder: Path = ROOT) -> Generator[subprocess.Popen[str]]:
    """Start a process; it and everything it has started, daemons too, are killed at the end of the context."""
    mark = secrets.token_hex(8)
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
        process.communicate()


def marked(mark: str) -> list[psutil.Process]:
    """The processes with this mark in their environment."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                found.append(process)
    return found
