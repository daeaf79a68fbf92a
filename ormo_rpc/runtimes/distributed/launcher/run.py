"""The live runtime: a server process and worker processes on one machine or many; workers call the server and nobody else.

`run` and `join` are called in the launcher, which starts every process of this machine (``python launch.py``), the one of its
rank (``torchrun``), or a guest of a run elsewhere (``role=worker``) as a child, and fills the place of each one that dies.
Only the children import torch.distributed.rpc, and only with ``wire.transport=uv`` does one have an agent::

    launcher                processes.py starts them, monitor.py fills their places, child.py is their entry point
    who is let in           addresses.py, secret.py; wire.py: messages and handshake; door.py: the server's side, with the memberships
                            of memberships.py; lease.py: the worker's side, and its heartbeat
    the server's process    serve.py; service.py: the lock around the parameter server; answers.py: who waits for a reply
    a worker's process      work.py; loop.py: from reply to push; calls.py: what it asks of the server
    shared memory and TCP   frames.py: what crosses; segments.py: memory that is shared; streams.py: the server's end,
                            stream_calls.py: the worker's end
    torch.distributed.rpc   agent.py; unpickling.py: what it may unpickle; handlers.py: the server's end,
                            rpc_calls.py: the worker's end
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ormo_rpc.config.parsing import save_config
from ormo_rpc.config.schema import Config
from ormo_rpc.errors import ConfigError, RunFailed
from ormo_rpc.runtimes.distributed.launcher.process_monitor import ProcessMonitor, ProcessSlot
from ormo_rpc.runtimes.distributed.launcher.processes import elastic_worker_process, local_processes, rank_process
from ormo_rpc.runtimes.distributed.launcher.supervisor import Supervisor
from ormo_rpc.runtimes.torchrun import Torchrun
from ormo_rpc.storage import checkpoint
from ormo_rpc.storage.run_directory import read_summary, write_summary
from ormo_rpc.storage.summary import unfinished_summary

TERMINAL_STATUSES = ("completed", "diverged")
"""How a run ends that a signal has come too late for."""


def run(config: Config, run_dir: Path) -> dict[str, Any]:
    """Start the children of this launcher, keep them at work to the end of the run, and return the summary.

    Raises:
        RunFailed: the run did not meet its end.
    """
    torchrun = Torchrun.from_environment()
    if torchrun is not None and torchrun.rank > 0:
        with Supervisor(_tell) as supervisor:
            monitor = _crew(supervisor, config)
            _keep_worker(monitor, rank_process(monitor, config, run_dir, torchrun), config)
        return {}
    run_dir.mkdir(parents=True, exist_ok=True)
    save_config(config, run_dir / "config.yaml")
    with Supervisor(_tell) as supervisor:
        monitor = _crew(supervisor, config)
        place = (
            local_processes(monitor, config, run_dir) if torchrun is None else rank_process(monitor, config, run_dir, torchrun)
        )
        with place as server:
            failure = _keep_server(monitor, server, config)
        interrupted = bool(supervisor.signals)
    summary = read_summary(run_dir)
    if failure is None or (summary is not None and summary["status"] in TERMINAL_STATUSES):
        return summary or {}
    if summary is None:
        try:
            write_summary(run_dir, unfinished_summary(config, "interrupted" if interrupted else "failed", str(failure)))
        except OSError as error:  # such as a full disk, which may be what the failure is about
            _tell(f"summary.json cannot be written: {error}")
    raise RunFailed(f"{failure}; {_what_is_left(run_dir)}", failure.exit_status)


def join(config: Config) -> None:
    """WorkerProcess for a server that runs already, until its run is over or we are asked to leave.

    Raises:
        RunFailed: the worker could not, or was not wanted.
    """
    with Supervisor(_tell) as supervisor:
        monitor = _crew(supervisor, config)
        slot = _keep_worker(monitor, elastic_worker_process(monitor, config), config)
    if slot.given_up:
        raise RunFailed(slot.exit_reason)


def _crew(supervisor: Supervisor, config: Config) -> ProcessMonitor:
    options = config.rpc
    return ProcessMonitor(
        supervisor, max_restarts=options.max_restarts, backoff_seconds=options.restart_backoff_seconds, tell=_tell
    )


def _keep_server(monitor: ProcessMonitor, server: ProcessSlot, config: Config) -> RunFailed | None:
    """Keep the server, and what workers are ours, at work until the run is over; return what went wrong, if anything did."""
    supervisor, patience = monitor.supervisor, config.rpc.stop_timeout_seconds
    workers = [slot for slot in monitor.slots if slot is not server]
    told: set[tuple[int, str]] = set()
    """Which news each life of the server has had."""

    def tell(**news: Any) -> None:
        if server.child is not None and (server.lives, str(news)) not in told:
            told.add((server.lives, str(news)))
            server.child.tell(**news)

    def over() -> bool:
        monitor.monitor()
        for slot in workers:
            if slot.over:
                tell(without=slot.worker)
        if workers and all(slot.over for slot in workers):
            tell(abandoned=next((slot.exit_reason for slot in reversed(workers) if slot.given_up), "all have left"))
        return server.over

    supervisor.wait(over)
    if server.done:
        # The run is over; whoever is late, because it still computes what nobody wants any more, is killed.
        supervisor.wait(lambda: all(slot.child is None or not slot.child.running for slot in workers), patience)
        return None
    if server.given_up:
        return RunFailed(f"{server.exit_reason}; the run has ended")
    name = supervisor.signals[0].name
    if server.child is not None:
        server.child.tell(stop={"status": "interrupted", "reason": name})
        _wait_for(supervisor, server, patience)
    return RunFailed(f"interrupted by {name}", exit_status=130)


def _keep_worker(monitor: ProcessMonitor, place: AbstractContextManager[ProcessSlot], config: Config) -> ProcessSlot:
    """Keep one worker at work until its work is done, or nobody wants it.

    Raises:
        RunFailed: it was interrupted, and did not leave in time.
    """
    supervisor = monitor.supervisor
    with place as slot:

        def over() -> bool:
            monitor.monitor()
            return slot.over

        if not supervisor.wait(over):
            name = supervisor.signals[0].name
            if slot.child is not None:
                slot.child.tell(leave=True)
                _wait_for(supervisor, slot, config.rpc.stop_timeout_seconds)
                monitor.monitor()
            if not slot.done:
                raise RunFailed(f"interrupted by {name}", exit_status=130)
            _tell(f"the worker has left, as {name} asked")
    return slot


def _wait_for(supervisor: Supervisor, slot: ProcessSlot, patience: float) -> None:
    """Wait until a child that was asked to end has ended; one more signal insists."""
    child = slot.child
    supervisor.wait(lambda: child is None or not child.running, patience, signals=len(supervisor.signals))


def _tell(text: str) -> None:
    print(f"launch.py: {text}", file=sys.stderr, flush=True)


def _what_is_left(run_dir: Path) -> str:
    """Where to go on from."""
    try:
        newest = checkpoint.find(run_dir)
    except ConfigError:
        return f"no checkpoint was written, logs are in {run_dir / 'logs'}"
    return f"iteration {checkpoint.iteration_of(newest)} is kept: go on with checkpoint.resume={run_dir}"
