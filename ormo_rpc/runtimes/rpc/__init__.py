"""The RPC runtime: a server process and worker processes connected by torch.distributed.rpc, on one machine or many.

`run` is called in the launcher, which starts every process of this machine (``python launch.py``) or the one of its rank
(``torchrun``) as a child, and watches it. Only the children import torch.distributed.rpc.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ormo_rpc import checkpoint
from ormo_rpc.config import Config, ConfigError, save_config
from ormo_rpc.run_directory import read_summary, write_summary
from ormo_rpc.runtimes.failure import RunFailed
from ormo_rpc.runtimes.rpc.processes import start_all, start_rank
from ormo_rpc.runtimes.supervisor import Child, Supervisor
from ormo_rpc.session import unfinished_summary
from ormo_rpc.torchrun import Torchrun

BLAME_SECONDS = 0.5
"""How long a worker's failure waits for news of the server's death, which would explain it."""


def run(config: Config, run_dir: Path) -> dict[str, Any]:
    """Start the children of this launcher, watch them to their end, and return the summary.

    Raises:
        RunFailed: the run did not meet its end.
    """
    torchrun = Torchrun.from_environment()
    first = torchrun is None or torchrun.rank == 0
    if first:
        run_dir.mkdir(parents=True, exist_ok=True)
        save_config(config, run_dir / "config.yaml")
    with Supervisor() as supervisor:
        if torchrun is None:
            start_all(supervisor, config, run_dir)
        else:
            start_rank(supervisor, config, run_dir, torchrun)
        failure = _watch(supervisor, config)
    if failure is None:
        return (read_summary(run_dir) or {}) if first else {}
    if first:
        if read_summary(run_dir) is None:
            write_summary(run_dir, unfinished_summary(config, "interrupted" if supervisor.signals else "failed", str(failure)))
        failure = RunFailed(f"{failure}; {_what_is_left(run_dir)}", failure.exit_status)
    raise failure


def _watch(supervisor: Supervisor, config: Config) -> RunFailed | None:
    """Watch the children until the run is over; return what went wrong, if anything did."""
    first, *others = supervisor.children
    patience = config.rpc.stop_timeout_seconds
    supervisor.wait(lambda: not first.running or any(child.failed for child in supervisor.children))
    if supervisor.signals:
        name = supervisor.signals[0].name
        _stop(supervisor, first, patience, status="interrupted", reason=name)
        return RunFailed(f"interrupted by {name}", exit_status=130)
    dead = _first_to_die(supervisor)
    if dead is not None:
        obituary = dead.obituary()
        _stop(supervisor, first, patience, status="failed", reason=obituary)
        return RunFailed(f"{obituary}; the run has ended")
    # The run is over; whoever is late, because it still computes what nobody wants any more, is killed.
    supervisor.wait(lambda: not any(child.running for child in others), patience)
    return None


def _first_to_die(supervisor: Supervisor) -> Child | None:
    """Who is to blame; where a worker fails, look whether it is because the server is gone."""
    first, *others = supervisor.children
    dead = next((child for child in others if child.failed), None)
    if dead is not None:
        supervisor.wait(lambda: not first.running, BLAME_SECONDS)
    if first.failed:
        return first
    return dead if first.running else None


def _stop(supervisor: Supervisor, child: Child, patience: float, **message: str) -> None:
    """Ask the server to write a checkpoint and end; the end of the supervisor's context kills what is left."""
    child.tell(stop=message)
    supervisor.wait(lambda: not child.running, patience, signals=len(supervisor.signals))


def _what_is_left(run_dir: Path) -> str:
    """Where to go on from."""
    try:
        newest = checkpoint.find(run_dir)
    except ConfigError:
        return f"no checkpoint was written, logs are in {run_dir / 'logs'}"
    return f"iteration {checkpoint.iteration_of(newest)} is kept: go on with checkpoint.resume={run_dir}"
