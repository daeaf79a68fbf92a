"""The launcher of a run of ``runtime=ddp``: starts the ranks of this machine, and ends all of them when one has died."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ormo_rpc import console
from ormo_rpc.config.parsing import save_config
from ormo_rpc.config.schema import Config
from ormo_rpc.errors import ConfigError, RunFailed, RunInterrupted
from ormo_rpc.runtimes.distributed.launcher.child import EXIT_SERVER_LOST
from ormo_rpc.runtimes.distributed.launcher.process_monitor import ProcessMonitor, ProcessSlot
from ormo_rpc.runtimes.distributed.launcher.processes import Launcher
from ormo_rpc.runtimes.distributed.launcher.supervisor import ChildProcess, Supervisor
from ormo_rpc.runtimes.distributed.preloading.preloading import Preloading
from ormo_rpc.runtimes.ranks import Ranks
from ormo_rpc.runtimes.temporary import temporary_folder
from ormo_rpc.storage.summary import (
    TERMINAL_STATUSES,
    extend_summary,
    read_summary,
    unfinished_summary,
    write_summary,
)

CULPRIT_SECONDS = 2.0
"""The time that is waited for the end of the rank that others have lost, to name it."""


def run(config: Config, run_dir: Path, began: float, preloading: Preloading) -> dict[str, Any]:
    """Start the ranks of this launcher, and wait for their end; return the summary, on other ranks than 0 nothing.

    Args:
        config: The configuration.
        run_dir: The run directory.
        began: Time on the monotonic clock at which the run began.
        preloading: Starts the processes.

    Raises:
        ConfigError: torchrun has started the ranks a second time, or an interface is named for one machine.
        RunFailed: a rank was lost, or the run was interrupted.
    """
    ranks = Ranks.from_environment()
    if ranks is not None and ranks.attempt > 0:
        raise ConfigError(
            f"runtime: got ddp {ranks.under} in attempt {ranks.attempt}, expected the first one: such a run cannot be resumed; "
            "use --max-restarts=0"
        )
    if ranks is None and config.ddp.interface is not None:
        raise ConfigError(f"runtime.interface: got {config.ddp.interface} without torchrun, expected None: all ranks are here")
    records = ranks is None or ranks.rank == 0
    if records:
        run_dir.mkdir(parents=True, exist_ok=True)
        save_config(config, run_dir / "config.yaml")
    preloading.report = console.report
    with temporary_folder("ormo_rpc_ddp") as folder, Supervisor(console.report) as supervisor:
        monitor = ProcessMonitor(supervisor, max_restarts=0, backoff_seconds=0.0, report=console.report)
        _start(monitor, config, run_dir, began, preloading, ranks, folder)
        failure = _supervise(monitor, config)
    return _ended(config, run_dir, began, failure) if records else _ended_elsewhere(failure)


def _start(
    monitor: ProcessMonitor,
    config: Config,
    run_dir: Path,
    began: float,
    preloading: Preloading,
    ranks: Ranks | None,
    folder: Path,
) -> None:
    """Start the ranks of this launcher; those of one machine find one another by a file in a folder of this user's own."""
    if ranks is None:
        logs: Path | None = run_dir / "logs"
        (run_dir / "logs").mkdir(exist_ok=True)
        own, more = range(config.num_workers), ["--one-machine", "--store-file", str(folder / "store")]
    else:
        logs, own = None, range(ranks.rank, ranks.rank + 1)
        more = ["--store", ranks.master, *(["--one-machine"] if ranks.one_machine else [])]
    launcher = Launcher(monitor.supervisor, config, preloading, logs=logs)
    for rank in own:
        start = launcher.rank(rank, run_dir, began, *more)
        monitor.add(f"rank {rank}", start, should_restart=_never, essential=True)


def _never(_: ChildProcess) -> bool:
    return False


def _supervise(monitor: ProcessMonitor, config: Config) -> RunFailed | None:
    """Wait for the end of all ranks, or for one that was lost; return the failure, if there is one."""
    supervisor = monitor.supervisor

    def over() -> bool:
        monitor.poll()
        return any(slot.given_up for slot in monitor.slots) or all(slot.finished for slot in monitor.slots)

    if not supervisor.wait(over):
        number = supervisor.signals[0]
        for slot in monitor.slots:
            if slot.child is not None:
                slot.child.send(stop={"status": "interrupted", "reason": number.name})
        supervisor.wait(over, config.live.stop_timeout_seconds, signals=len(supervisor.signals))
        return RunInterrupted(number)
    if any(slot.given_up for slot in monitor.slots):
        supervisor.wait(lambda: over() and _culprit(monitor) is not None, CULPRIT_SECONDS)
        culprit = _culprit(monitor) or next(slot for slot in monitor.slots if slot.given_up)
        return RunFailed(f"{culprit.exit_reason}; runtime=ddp cannot go on without it")
    left_on = next((slot.left_on for slot in monitor.slots if slot.left_on is not None), None)
    return None if left_on is None else RunInterrupted(left_on)


def _culprit(monitor: ProcessMonitor) -> ProcessSlot | None:
    """The rank that has ended for another reason than the loss of another one."""
    return next((slot for slot in monitor.slots if slot.given_up and slot.exit_code != EXIT_SERVER_LOST), None)


def _ended(config: Config, run_dir: Path, began: float, failure: RunFailed | None) -> dict[str, Any]:
    """Return the summary of a run that has ended by itself.

    Raises:
        RunFailed: it has not.
    """
    summary, seconds = read_summary(run_dir), time.monotonic() - began
    if summary is not None:
        summary = extend_summary(run_dir, summary, seconds)
        if failure is None or summary["status"] in TERMINAL_STATUSES:
            return summary
    failure = failure or RunFailed(f"rank 0 has ended without a summary, see the logs in {run_dir / 'logs'}")
    if summary is None:
        status = "interrupted" if isinstance(failure, RunInterrupted) else "failed"
        try:
            write_summary(run_dir, unfinished_summary(config, status, str(failure), seconds))
        except OSError as error:  # such as a full disk, which may be the cause of the failure
            console.report(f"summary.json cannot be written: {error}")
    failure.args = (f"{failure}; a run of runtime=ddp cannot be resumed",)
    raise failure


def _ended_elsewhere(failure: RunFailed | None) -> dict[str, Any]:
    if failure is not None:
        raise failure
    return {}
