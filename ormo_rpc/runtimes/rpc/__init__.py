"""The RPC runtime: a server process and worker processes connected by torch.distributed.rpc, on one machine or many.

`run` is called in the launcher, which starts every process of this machine (``python launch.py``) or the one of its rank
(``torchrun``) as a child, and watches it. Only the children import torch.distributed.rpc.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ormo_rpc.config import Config, save_config
from ormo_rpc.run_directory import read_summary, write_summary
from ormo_rpc.runtimes.failure import RunFailed
from ormo_rpc.runtimes.supervisor import Child, Supervisor

BLAME_SECONDS = 0.5
"""How long a worker's failure waits for news of the server's death, which would explain it."""


def global_rank() -> int:
    """This process's rank under torchrun; 0 elsewhere."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def run(config: Config, run_dir: Path) -> dict[str, Any]:
    """Start the children of this launcher, watch them to their end, and return the summary.

    Raises:
        RunFailed: the run did not meet its end.
    """
    torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    rank = global_rank()
    if rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        save_config(config, run_dir / "config.yaml")
    with Supervisor() as supervisor:
        if torchrun:
            _start_rank(supervisor, config, run_dir, rank)
        else:
            _start_all(supervisor, config, run_dir)
        failure = _watch(supervisor, config, run_dir)
    if rank == 0 and failure is not None and read_summary(run_dir) is None:
        write_summary(run_dir, {"status": "failed", "reason": str(failure)})
    if failure is not None:
        raise failure
    return (read_summary(run_dir) or {}) if rank == 0 else {}


def _start_all(supervisor: Supervisor, config: Config, run_dir: Path) -> None:
    """Server and workers on this machine, over loopback. The store's socket is bound here, so its port is free for certain."""
    logs = run_dir / "logs"
    logs.mkdir(exist_ok=True)
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        store = f"127.0.0.1:{listener.getsockname()[1]}"
        size = config.num_workers + 1
        for rank in range(size):
            name = "server" if rank == 0 else f"worker {rank - 1}"
            command = _command(config, rank, size, store)
            descriptors: list[int] = []
            if rank == 0:
                command += ["--listen", str(listener.fileno())]
                descriptors.append(listener.fileno())
            log = logs / f"{name.replace(' ', '_')}.log"
            _start(
                supervisor, name, command, _environment(config, loopback=True), log, descriptors, run_dir if rank == 0 else None
            )


def _start_rank(supervisor: Supervisor, config: Config, run_dir: Path, rank: int) -> None:
    """The one child of a rank under torchrun, which finds the others through the store of torchrun's agent."""
    size = int(os.environ["WORLD_SIZE"])
    store = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    command = _command(config, rank, size, store)
    command += ["--prefix", f"ormo_rpc/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"]
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        command += ["--host-store"]
    loopback = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    name = "server" if rank == 0 else f"worker {rank - 1}"
    _start(supervisor, name, command, _environment(config, loopback=loopback), None, [], run_dir if rank == 0 else None)


def _command(config: Config, rank: int, size: int, store: str) -> list[str]:
    timeout = str(config.rpc.start_timeout_seconds)
    return [
        *(sys.executable, "-m", "ormo_rpc.runtimes.rpc.child", "--rank", str(rank), "--world-size", str(size)),
        *("--store", store, "--start-timeout", timeout),
    ]


def _start(
    supervisor: Supervisor,
    name: str,
    command: list[str],
    env: dict[str, str],
    log: Path | None,
    descriptors: Sequence[int],
    run_dir: Path | None,
) -> None:
    """Start one child; the server gets the run directory, and our terminal for its progress bar."""
    if run_dir is not None:
        command += ["--run-dir", str(run_dir)]
    terminal = os.dup(sys.stderr.fileno()) if run_dir is not None and sys.stderr.isatty() else None
    if terminal is None:
        supervisor.start(name, command, env=env, log=log, pass_fds=descriptors)
        return
    try:  # under a number of its own, since the child's standard error is its log
        supervisor.start(name, [*command, "--terminal", str(terminal)], env=env, log=log, pass_fds=[*descriptors, terminal])
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


def _watch(supervisor: Supervisor, config: Config, run_dir: Path) -> RunFailed | None:
    """Watch the children until the run is over; return what went wrong, if anything did."""
    children = supervisor.children
    patience = config.rpc.stop_timeout_seconds

    def over() -> bool:
        return any(child.exit_code not in (None, 0) for child in children) or children[0].exit_code is not None

    supervisor.wait(over)
    dead = _first_to_die(supervisor)
    if supervisor.interrupted is not None:
        name = supervisor.interrupted.name
        _stop(supervisor, children[0], patience, status="interrupted", reason=name)
        return RunFailed(f"interrupted by {name}; {_what_is_left(run_dir)}", exit_status=130)
    if dead is not None:
        _stop(supervisor, children[0], patience, status="failed", reason=dead.obituary())
        return RunFailed(f"{dead.obituary()}; the run has ended, {_what_is_left(run_dir)}")
    if not supervisor.wait(lambda: all(child.exit_code is not None for child in children), patience):
        late = ", ".join(child.name for child in children if child.exit_code is None)
        return RunFailed(f"{late}: still running {patience} s after the run was over")
    dead = next((child for child in children if child.exit_code != 0), None)
    return None if dead is None else RunFailed(dead.obituary())


def _first_to_die(supervisor: Supervisor) -> Child | None:
    """Who is to blame; where a worker fails, look whether it is because the server is gone."""
    server, *others = supervisor.children
    dead = next((child for child in others if child.exit_code not in (None, 0)), None)
    if dead is not None and server is not dead:
        supervisor.wait(lambda: server.exit_code is not None, BLAME_SECONDS)
    return server if server.exit_code not in (None, 0) else dead


def _stop(supervisor: Supervisor, child: Child, patience: float, **message: str) -> None:
    """Ask the server to write a checkpoint and end; the end of the supervisor's context kills what is left."""
    child.tell(stop=message)
    supervisor.wait(lambda: child.exit_code is not None, patience)


def _what_is_left(run_dir: Path) -> str:
    summary = read_summary(run_dir)
    if summary is None or not summary.get("checkpoint"):
        return f"no checkpoint was written, logs are in {run_dir / 'logs'}"
    return f"iteration {summary['iterations']} is kept: go on with checkpoint.resume={run_dir}"
