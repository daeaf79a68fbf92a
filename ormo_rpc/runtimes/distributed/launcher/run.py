"""The live runtime: a server process and worker processes, on one machine or many; workers call the server only.

`run` and `join` run in the launcher, which starts all processes of this machine (``python launch.py``), the one of its rank
(``torchrun``), or an elastic worker of a run elsewhere (``role=worker``), and restarts those that die::

    launcher           processes.py: the command line of each role; process_monitor.py: restarts; supervisor.py: the parent's
                       side of the children's pipes, child.py: theirs; entry_point.py: the children's main
    rendezvous         listener.py: the server's side; lease.py: a worker's; protocol.py: the handshake
    server_process     service.py: the lock around the parameter server, and memberships
    worker_process     from reply to push
    transports         how pushes and replies cross
"""

from __future__ import annotations

import sys
import time
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
from ormo_rpc.storage.summary import read_summary, unfinished_summary, write_summary

TERMINAL_STATUSES = ("completed", "diverged")
"""The statuses of a run that has ended by itself; a signal that comes later changes nothing."""


def run(config: Config, run_dir: Path, began: float) -> dict[str, Any]:
    """Start the processes of this launcher, keep them running to the end of the run, and return the summary.

    Args:
        config: The configuration.
        run_dir: The run directory.
        began: Time on the monotonic clock at which the run began.

    Raises:
        RunFailed: the run was interrupted, or failed.
    """
    torchrun = Torchrun.from_environment()
    if torchrun is not None and torchrun.rank > 0:
        with Supervisor(_report) as supervisor:
            monitor = _monitor(supervisor, config)
            _supervise_worker(monitor, rank_process(monitor, config, run_dir, torchrun, began), config)
        return {}
    run_dir.mkdir(parents=True, exist_ok=True)
    save_config(config, run_dir / "config.yaml")
    with Supervisor(_report) as supervisor:
        monitor = _monitor(supervisor, config)
        if torchrun is None:
            processes = local_processes(monitor, config, run_dir, began)
        else:
            processes = rank_process(monitor, config, run_dir, torchrun, began)
        with processes as server:
            failure = _supervise_server(monitor, server, config)
        interrupted = bool(supervisor.signals)
    summary = read_summary(run_dir)
    if failure is None or (summary is not None and summary["status"] in TERMINAL_STATUSES):
        return summary or {}
    if summary is None:
        status = "interrupted" if interrupted else "failed"
        try:
            write_summary(run_dir, unfinished_summary(config, status, str(failure), time.monotonic() - began))
        except OSError as error:  # such as a full disk, which may be the cause of the failure
            _report(f"summary.json cannot be written: {error}")
    raise RunFailed(f"{failure}; {_how_to_resume(run_dir)}", failure.exit_status)


def join(config: Config) -> None:
    """Run an elastic worker until the run is over or it is asked to leave.

    Raises:
        RunFailed: the worker failed, or was refused or banned.
    """
    with Supervisor(_report) as supervisor:
        monitor = _monitor(supervisor, config)
        slot = _supervise_worker(monitor, elastic_worker_process(monitor, config), config)
    if slot.given_up:
        raise RunFailed(slot.exit_reason)


def _monitor(supervisor: Supervisor, config: Config) -> ProcessMonitor:
    options = config.rpc
    return ProcessMonitor(
        supervisor, max_restarts=options.max_restarts, backoff_seconds=options.restart_backoff_seconds, report=_report
    )


def _supervise_server(monitor: ProcessMonitor, server: ProcessSlot, config: Config) -> RunFailed | None:
    """Keep the server and this launcher's workers running to the end of the run; return the failure, if there is one."""
    supervisor, timeout = monitor.supervisor, config.rpc.stop_timeout_seconds
    workers = [slot for slot in monitor.slots if slot is not server]
    sent: set[tuple[int, str]] = set()
    """Messages that each incarnation of the server has been sent."""

    def send(**message: Any) -> None:
        if server.child is not None and (server.restart_count, str(message)) not in sent:
            sent.add((server.restart_count, str(message)))
            server.child.send(**message)

    def finished() -> bool:
        monitor.poll()
        for slot in workers:
            if slot.finished:
                send(worker_ended=slot.worker)
        if workers and all(slot.finished for slot in workers):
            send(all_workers_ended=next((slot.exit_reason for slot in reversed(workers) if slot.given_up), "all have left"))
        return server.finished

    supervisor.wait(finished)
    if server.done:
        # The run is over; a worker that still computes a ticket that is not needed any more is killed.
        supervisor.wait(lambda: all(slot.child is None or not slot.child.running for slot in workers), timeout)
        return None
    if server.given_up:
        return RunFailed(f"{server.exit_reason}; the run has ended")
    name = supervisor.signals[0].name
    if server.child is not None:
        server.child.send(stop={"status": "interrupted", "reason": name})
        _wait_for_exit(supervisor, server, timeout)
    return RunFailed(f"interrupted by {name}", exit_status=130)


def _supervise_worker(monitor: ProcessMonitor, process: AbstractContextManager[ProcessSlot], config: Config) -> ProcessSlot:
    """Keep one worker running until its work is done or it is given up.

    Raises:
        RunFailed: it was interrupted, and did not leave in time.
    """
    supervisor = monitor.supervisor
    with process as slot:

        def finished() -> bool:
            monitor.poll()
            return slot.finished

        if not supervisor.wait(finished):
            name = supervisor.signals[0].name
            if slot.child is not None:
                slot.child.send(leave=True)
                _wait_for_exit(supervisor, slot, config.rpc.stop_timeout_seconds)
                monitor.poll()
            if not slot.done:
                raise RunFailed(f"interrupted by {name}", exit_status=130)
            _report(f"the worker left the run on {name}")
    return slot


def _wait_for_exit(supervisor: Supervisor, slot: ProcessSlot, timeout_seconds: float) -> None:
    """Wait until a child that was asked to end has ended; one more signal ends the wait."""
    child = slot.child
    supervisor.wait(lambda: child is None or not child.running, timeout_seconds, signals=len(supervisor.signals))


def _report(text: str) -> None:
    print(f"launch.py: {text}", file=sys.stderr, flush=True)


def _how_to_resume(run_dir: Path) -> str:
    try:
        newest = checkpoint.locate(run_dir)
    except ConfigError:
        return f"no checkpoint was written, see the logs in {run_dir / 'logs'}"
    return f"iteration {checkpoint.iteration_of(newest)} is kept: resume with checkpoint.resume={run_dir}"
