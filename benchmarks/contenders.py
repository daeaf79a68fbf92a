"""Who takes part in `side_by_side`, and how one of them is run: a process of its own that prints a line of JSON."""

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

from benchmarks.peers.rpc_flat import ONLY_TCP

ROOT = Path(__file__).parents[1]
TIMEOUT_SECONDS = 240.0
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "TP_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
MARK = "ORMO_RPC_BENCHMARK"
"""A variable in the environment of all processes of one measurement, by which they are found in the end."""
ELSEWHERE = {name: ROOT / f".venv-{name}" for name in ("ray", "tensorflow")}
"""The environments of peers that have their own, made by ``make bench-NAME``."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """How one is run.

    Attributes:
        name: In tables.
        module: ``python -m`` this.
        arguments: Its own, besides D, K and S.
        environment: The folder of its own environment; None for ours.
        variables: Added to the variables of its environment.
        overhead_seconds: About how long it takes besides S, on two cores: nearly all of it is loading libraries.
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


def _ours(name: str, *arguments: str) -> Contender:
    return Contender(name=name, module="benchmarks.throughput", arguments=("--json", *arguments), overhead_seconds=10.0)


def _peer(name: str, module: str = "", **options: Any) -> Contender:
    return Contender(name=name, module=f"benchmarks.peers.{module or name}", **options)


FLOOR, REFERENCE = "raw_sockets", "rpc_tensors"
"""Whom all others are compared with: what a person would write by hand, and what PyTorch's own example does."""
CONTENDERS = {
    c.name: c
    for c in (
        _ours("ormo_rpc"),
        _ours("ormo_rpc_tcp", "--transport", "tcp"),
        _ours("ormo_rpc_uv", "--transport", "uv"),
        _ours("ormo_rpc_tcp_bf16", "--transport", "tcp", "--wire", "bf16"),
        _ours("ormo_rpc_uv_bf16", "--transport", "uv", "--wire", "bf16"),
        _peer(FLOOR),
        _peer(REFERENCE),
        _peer("rpc_flat"),
        _peer("rpc_flat_huge", "rpc_flat", variables=(("THP_MEM_ALLOC_ENABLE", "1"),)),
        _peer("rpc_flat_uv", "rpc_flat", variables=((ONLY_TCP, "1"),)),
        _peer("gloo"),
        _peer("ray", "ray_server", environment=ELSEWHERE["ray"], overhead_seconds=10.0),
        _peer("tensorflow", "tensorflow_server", environment=ELSEWHERE["tensorflow"], overhead_seconds=13.0),
    )
}
DEFAULT = tuple(name for name in CONTENDERS if name != "rpc_flat_huge")


def run(contender: Contender, parameters: int, workers: int, seconds: float) -> dict[str, Any] | str:
    """One measurement; where there is none, why. Nothing that it has started is left."""
    if not contender.python.exists():
        return f"not installed: make bench-{contender.name}"
    command = [
        *(str(contender.python), "-m", contender.module, "--parameters", str(parameters), "--workers", str(workers)),
        *("--seconds", str(seconds), *contender.arguments),
    ]
    variables = {**os.environ, **LOOPBACK, "PYTHONPATH": str(ROOT), **dict(contender.variables)}
    with _family(command, variables) as process:
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
        return f"got {lines[-1]!r}, expected a line of JSON"


@contextlib.contextmanager
def _family(command: list[str], variables: dict[str, str]) -> Generator[subprocess.Popen[str]]:
    """A process; it and all that it has started, daemons too, are killed in the end."""
    mark = secrets.token_hex(8)
    process = subprocess.Popen(
        command, cwd=ROOT, env={**variables, MARK: mark}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
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
    """The processes that have this mark in their environment."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                found.append(process)
    return found
