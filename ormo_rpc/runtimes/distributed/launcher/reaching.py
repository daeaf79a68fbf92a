"""Finding the run that an elastic worker is for, before a process is started for it.

The launcher of a run listens at its address from before the first process to the end of the last one, whatever becomes of its
server. Where nothing listens, the run has ended, or has not begun.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from ormo_rpc.config.schema import Config
from ormo_rpc.errors import ConfigError, RunFailed, RunInterrupted, WireError
from ormo_rpc.rendezvous.addresses import parse_address, written
from ormo_rpc.rendezvous.connecting import NothingListens
from ormo_rpc.rendezvous.lease import connect
from ormo_rpc.rendezvous.secret import Secret, require_secret
from ormo_rpc.runtimes.distributed.launcher.supervisor import Supervisor
from ormo_rpc.storage.summary import TERMINAL_STATUSES, read_summary

PART_OF_START_TIMEOUT = 1 / 3
"""The part of ``runtime.start_timeout_seconds`` for which a worker waits for a run to begin."""
ATTEMPT_SECONDS = 1.0
"""For each step of an attempt; a server that takes longer is the worker's to wait for."""
RETRY_SECONDS = 0.2
"""The pause between two attempts."""


def reach(config: Config, supervisor: Supervisor, report: Callable[[str], None]) -> bool:
    """Wait until something listens at ``server.address``; tell at once where nothing does.

    Args:
        config: Of the elastic worker.
        supervisor: Takes note of signals.
        report: Called with messages for people.

    Returns:
        False where the run is known to have ended: by the summary beside ``server.secret_file``, where that is the run's own.

    Raises:
        RunFailed: nothing listens for too long.
        RunInterrupted: by a signal.
    """
    address, secret = parse_address(config.server.address or ""), require_secret(config.server.secret_file)
    where, timeout_seconds = written(*address), config.rpc.start_timeout_seconds * PART_OF_START_TIMEOUT
    began, told = time.monotonic(), False
    while not _listens(address, secret):
        status = _status_of_ended(config)
        if status is not None:
            report(
                f"nothing listens at {where}: the run of {Path(config.server.secret_file or '').parent} has ended ({status})"
            )
            return False
        waited = time.monotonic() - began
        if waited >= timeout_seconds:
            raise RunFailed(
                f"no server can be joined at {where}: nothing listens there; gave up after {waited:.1f} s, a third of "
                "runtime.start_timeout_seconds"
            )
        if not told:
            told = True
            report(f"nothing listens at {where}: the run has ended, or not begun; trying for another {timeout_seconds:.0f} s")
        supervisor.wait(lambda: False, RETRY_SECONDS)
        if supervisor.signals:
            raise RunInterrupted(supervisor.signals[0])
    return True


def _listens(address: tuple[str, int], secret: Secret) -> bool:
    """Tell if a connection is not refused; any other failure is the worker's, which is more patient and says what it is."""
    try:
        connect(address, secret, timeout_seconds=ATTEMPT_SECONDS).connection.close()
    except NothingListens:
        return False
    except (OSError, EOFError, WireError):
        pass
    return True


def _status_of_ended(config: Config) -> str | None:
    """The status of a run that has ended by itself, whose own secret this worker was given; None where that is not known."""
    if config.server.secret_file is None:
        return None
    try:
        summary = read_summary(Path(config.server.secret_file).parent)
    except (OSError, ConfigError):
        return None
    status = None if summary is None else str(summary.get("status"))
    return status if status in TERMINAL_STATUSES else None
