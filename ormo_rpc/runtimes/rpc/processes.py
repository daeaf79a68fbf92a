"""Starting the processes of a run: all of them on this machine, or the one of this rank under torchrun."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from ormo_rpc.config import Config
from ormo_rpc.runtimes.supervisor import Supervisor
from ormo_rpc.torchrun import Torchrun


def start_all(supervisor: Supervisor, config: Config, run_dir: Path) -> None:
    """Server and workers on this machine, over loopback. The store's socket is bound here, so its port is free for certain."""
    logs = run_dir / "logs"
    logs.mkdir(exist_ok=True)
    env = _environment(config, loopback=True)
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        store = f"127.0.0.1:{listener.getsockname()[1]}"
        for rank in range(config.num_workers + 1):
            command = _command(config, rank, config.num_workers + 1, store)
            log = logs / f"{_name(rank).replace(' ', '_')}.log"
            if rank == 0:
                command += ["--listen", str(listener.fileno())]
                _start_server(supervisor, command, env, log, run_dir, [listener.fileno()])
            else:
                supervisor.start(_name(rank), command, env=env, log=log)


def start_rank(supervisor: Supervisor, config: Config, run_dir: Path, torchrun: Torchrun) -> None:
    """The one child of a rank under torchrun, which finds the others through the store of torchrun's agent."""
    rank = torchrun.rank
    command = _command(config, rank, torchrun.world_size, torchrun.store)
    command += ["--prefix", f"ormo_rpc/{torchrun.attempt}"]
    env = _environment(config, loopback=torchrun.one_machine)
    if rank > 0:
        supervisor.start(_name(rank), command, env=env, log=None)
        return
    if not torchrun.agent_store:
        command += ["--host-store"]
    _start_server(supervisor, command, env, None, run_dir, [])


def _name(rank: int) -> str:
    return "server" if rank == 0 else f"worker {rank - 1}"


def _command(config: Config, rank: int, size: int, store: str) -> list[str]:
    return [
        *(sys.executable, "-m", "ormo_rpc.runtimes.rpc.child", "--rank", str(rank), "--world-size", str(size)),
        *("--store", store, "--start-timeout", str(config.rpc.start_timeout_seconds)),
    ]


def _start_server(
    supervisor: Supervisor, command: list[str], env: dict[str, str], log: Path | None, run_dir: Path, inherited: Sequence[int]
) -> None:
    """Start the server, which gets the run directory, and our terminal for its progress bar."""
    command += ["--run-dir", str(run_dir)]
    if sys.stderr is None or not sys.stderr.isatty():  # pyright: ignore[reportUnnecessaryComparison] # None where it was closed
        supervisor.start(_name(0), command, env=env, log=log, pass_fds=inherited)
        return
    terminal = os.dup(sys.stderr.fileno())  # a number of its own, since the child's standard error is its log
    try:
        command += ["--terminal", str(terminal)]
        supervisor.start(_name(0), command, env=env, log=log, pass_fds=[*inherited, terminal])
    finally:
        os.close(terminal)


def _environment(config: Config, *, loopback: bool) -> dict[str, str]:
    """The children's environment: which interface they talk over, threads that do not fight, and the modules that we see."""
    env = {
        **os.environ,
        "OMP_NUM_THREADS": str(config.runtime.threads),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path) or os.environ.get("PYTHONPATH", ""),
        "PYTHONUNBUFFERED": "1",
        # Every ordinary goodbye makes the agents warn of closed pipes.
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
    }
    interface = _loopback_interface() if loopback else config.rpc.interface
    if interface is not None:
        env |= {"TP_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface}
    return env


def _loopback_interface() -> str | None:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), None)
