"""The live runtime: a server process and worker processes, on one machine or many; workers call the server only.

`run` and `join` run in the launcher, which starts all processes of this machine (``python launch.py``), the one of its rank
(``torchrun``), or an elastic worker of a run elsewhere (``role=worker``), and restarts those that die::

    launcher           processes.py: the command line of each role; process_monitor.py: restarts; supervisor.py: the parent's
                       side of the children's pipes, child.py: theirs; entry_point.py: the children's main
    preloading         preloading.py: how children are started; client.py: the launcher's side of a preloader; process.py: a
                       preloader's main; load.py: data and model; forking.py, safety.py: forks, and where none may be made
    rendezvous         listener.py: the server's side; lease.py: a worker's; protocol.py: the handshake
    control            joining.py: a worker's way into the run; server.py: the server's side; torch_rpc, lines.py: the carriers
    server_process     service.py: the lock around the parameter server, and memberships
    worker_process     from reply to push
    transports         how pushes and replies cross
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from signal import Signals
from typing import Any

from ormo_rpc import console
from ormo_rpc.config.parsing import save_config
from ormo_rpc.config.schema import Config
from ormo_rpc.errors import ConfigError, RunFailed, RunInterrupted
from ormo_rpc.runtimes.distributed.launcher.child import EXIT_SERVER_LOST
from ormo_rpc.runtimes.distributed.launcher.process_monitor import ProcessMonitor, ProcessSlot
from ormo_rpc.runtimes.distributed.launcher.processes import elastic_worker_process, local_processes, rank_process
from ormo_rpc.runtimes.distributed.launcher.rank_messages import Rank, WorkerRank
from ormo_rpc.runtimes.distributed.launcher.reaching import reach
from ormo_rpc.runtimes.distributed.launcher.supervisor import Supervisor
from ormo_rpc.runtimes.distributed.preloading.client import JOBS
from ormo_rpc.runtimes.distributed.preloading.preloading import Preloading
from ormo_rpc.runtimes.ranks import Ranks
from ormo_rpc.runtimes.torchrun_store import tell_result
from ormo_rpc.storage import checkpoint
from ormo_rpc.storage.counters import RunCounters
from ormo_rpc.storage.summary import (
    TERMINAL_STATUSES,
    extend_summary,
    forget_summary,
    read_summary,
    unfinished_summary,
    write_summary,
)


def run(config: Config, run_dir: Path, began: float, preloading: Preloading) -> dict[str, Any]:
    """Start the processes of this launcher, keep them running to the end of the run, and return the summary.

    Args:
        config: The configuration.
        run_dir: The run directory.
        began: Time on the monotonic clock at which this start of the run began.
        preloading: Starts the processes.

    Raises:
        RunFailed: the run was interrupted, or failed.
    """
    ranks = Ranks.from_environment()
    if ranks is not None and ranks.rank > 0:
        _run_worker_rank(config, run_dir, ranks, began, preloading)
        return {}
    run_dir.mkdir(parents=True, exist_ok=True)
    began = RunCounters.began(run_dir, began)
    former = read_summary(run_dir)
    if former is not None and ranks is not None and former["status"] in TERMINAL_STATUSES:
        if ranks.agent_store:
            tell_result(ranks.master, former)  # the ranks were started again after that
        return former
    forget_summary(run_dir)
    save_config(config, run_dir / "config.yaml")
    preloading.report = console.report
    with Supervisor(console.report) as supervisor:
        monitor = _monitor(supervisor, config)
        if ranks is None:
            processes = local_processes(monitor, config, preloading, run_dir, began)
        else:
            if ranks.attempt > 0 and RunCounters.incarnations_of(run_dir) == 0:
                console.report(_nothing_to_continue(config, ranks))
            processes = rank_process(monitor, config, preloading, run_dir, ranks, began, console.report)
        with processes as server:
            failure = _supervise_server(monitor, server, config)
    summary = read_summary(run_dir)
    if summary is not None:
        summary = extend_summary(run_dir, summary, time.monotonic() - began)
        ended = summary["status"] in TERMINAL_STATUSES
        if ended and preloading.programs != JOBS and failure is not None and not isinstance(failure, RunInterrupted):
            failure.args = (f"{server.exit_reason}; before that the run {summary['status']}",)  # by what its script does then
            raise failure
    if failure is None or (summary is not None and summary["status"] in TERMINAL_STATUSES):
        if ranks is not None and summary is not None:
            Rank(ranks, console.report).say(f"the run {summary['status']}: {summary['gradients_computed']} gradients")
        return summary or {}
    if summary is None:
        status = "interrupted" if isinstance(failure, RunInterrupted) else "failed"
        try:
            write_summary(run_dir, unfinished_summary(config, status, str(failure), time.monotonic() - began))
        except OSError as error:  # such as a full disk, which may be the cause of the failure
            console.report(f"summary.json cannot be written: {error}")
    failure.args = (f"{failure}; {_how_to_resume(run_dir)}",)
    raise failure


def _run_worker_rank(config: Config, run_dir: Path, ranks: Ranks, began: float, preloading: Preloading) -> None:
    """Run the worker of a rank until the run is over or it is told to end.

    Raises:
        RunFailed: the server is lost, or has never let this worker in, so that the ranks are started again, or the job ends.
    """
    with Supervisor(console.report) as supervisor, WorkerRank(ranks, console.report, config) as rank:
        monitor = _monitor(supervisor, config)
        process = rank_process(monitor, config, preloading, run_dir, ranks, began, console.report)
        slot = _supervise_worker(monitor, process, config, rank.say, rank.ended.is_set)
        if supervisor.signals or slot.left_on is not None:
            return
        if rank.ended.is_set() or slot.done:
            rank.say_end(config.rpc.stop_timeout_seconds)
        elif slot.exit_code == EXIT_SERVER_LOST or not slot.joined:
            raise RunFailed(slot.exit_reason)
        else:
            console.report(f"{slot.exit_reason}; the run continues without it")


def _nothing_to_continue(config: Config, ranks: Ranks) -> str:
    begins = "from the parameters of its seed" if config.checkpoint.resume is None else f"from {config.checkpoint.resume}"
    return (
        f"{ranks.launcher} has started the ranks again (attempt {ranks.attempt}), and the run that they had is not on this "
        f"node ({socket.gethostname()}): a new one begins, {begins} (checkpoint.resume)"
    )


def join(config: Config, preloading: Preloading) -> None:
    """Run an elastic worker until the run is over or it is asked to leave.

    Args:
        config: Its configuration.
        preloading: Starts it.

    Raises:
        ConfigError: its process was to be forked, and cannot be.
        RunFailed: the worker failed, or was refused or banned, or nothing listens at ``server.address``.
    """
    preloading.report = console.report
    with Supervisor(console.report) as supervisor:
        if not reach(config, supervisor, console.report):
            return
        preloading.use_imports(config)
        monitor = _monitor(supervisor, config)
        slot = _supervise_worker(
            monitor, elastic_worker_process(monitor, config, preloading, console.report), config, console.report
        )
    if slot.given_up:
        raise RunFailed(slot.exit_reason)


def _monitor(supervisor: Supervisor, config: Config) -> ProcessMonitor:
    options = config.rpc
    return ProcessMonitor(
        supervisor, max_restarts=options.max_restarts, backoff_seconds=options.restart_backoff_seconds, report=console.report
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
        if supervisor.watch.take_checkpoint():
            if server.child is None:
                console.report("no checkpoint now: the server is being restarted, from the newest one")
            else:
                server.child.send(checkpoint=True)
        for slot in workers:
            if slot.death is not None:
                send(worker_died=slot.death)
            if slot.finished:
                send(worker_ended=slot.worker)
        if workers and all(slot.finished for slot in workers):
            send(all_workers_ended=next((slot.exit_reason for slot in reversed(workers) if slot.given_up), "all have left"))
        return server.finished

    supervisor.wait(finished)
    if server.done and server.left_on is None:
        # The run is over: a worker that computes a ticket that nobody needs has this time, one that has yet to join has none.
        supervisor.wait(lambda: not any(slot.child and slot.child.joined and slot.child.running for slot in workers), timeout)
        return None
    if server.given_up:
        return RunFailed(f"{server.exit_reason}; the run has ended")
    number = server.left_on or supervisor.signals[0]  # the server may have got it alone
    _stop_server(monitor, server, config, number)
    return RunInterrupted(number)


def _stop_server(monitor: ProcessMonitor, server: ProcessSlot, config: Config, number: Signals) -> None:
    """Let the server write its checkpoint and end; one that was killed before has pushes in its journal that are in none."""
    for _ in range(2):  # it may be killed meanwhile
        monitor.poll()
        if server.child is None and not server.finished and config.checkpoint.journal:
            monitor.refill(server)
        if server.child is None:
            return
        server.child.send(stop={"status": "interrupted", "reason": number.name})
        _wait_for_exit(monitor.supervisor, server, config.rpc.stop_timeout_seconds)
        if server.child.running:
            return


def _supervise_worker(
    monitor: ProcessMonitor,
    process: AbstractContextManager[ProcessSlot],
    config: Config,
    say: Callable[[str], None],
    over: Callable[[], bool] = lambda: False,
) -> ProcessSlot:
    """Keep one worker running until its work is done or it is given up.

    Args:
        monitor: Starts it again.
        process: Starts it.
        config: Its configuration.
        say: Called with messages for people.
        over: Returns True once the run is over; a worker that does not end by itself then, as it looks for a server, is killed.

    Raises:
        RunFailed: it was interrupted, and did not leave in time.
    """
    supervisor = monitor.supervisor
    with process as slot:

        def finished() -> bool:
            monitor.poll()
            return slot.finished

        if not supervisor.wait(lambda: finished() or over()):
            number = supervisor.signals[0]
            if slot.child is not None:
                slot.child.send(leave=True)
                _wait_for_exit(supervisor, slot, config.rpc.stop_timeout_seconds)
                monitor.poll()
            if not slot.done:
                raise RunInterrupted(number)
            say(f"the worker left the run on {number.name}")
        elif slot.left_on is not None:  # it got the signal alone
            say(f"the worker left the run on {slot.left_on.name}")
        supervisor.wait(finished, config.rpc.stop_timeout_seconds, signals=len(supervisor.signals))
    return slot


def _wait_for_exit(supervisor: Supervisor, slot: ProcessSlot, timeout_seconds: float) -> None:
    """Wait until a child that was asked to end has ended; one more signal ends the wait."""
    child = slot.child
    supervisor.wait(lambda: child is None or not child.running, timeout_seconds, signals=len(supervisor.signals))


def _how_to_resume(run_dir: Path) -> str:
    try:
        newest = checkpoint.locate(run_dir)
    except ConfigError:
        return f"no checkpoint was written, see the logs in {run_dir / 'logs'}"
    return f"iteration {checkpoint.iteration_of(newest)} is kept: resume with checkpoint.resume={run_dir}"
