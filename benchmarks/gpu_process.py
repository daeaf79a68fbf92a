"""Run a command with a limit of time, and end all that it has started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.measuring import ROOT

GRACE = 10.0
"""Seconds from the signal that ends a command to that which it cannot refuse."""


def call(command: Sequence[str], log: Path, seconds: float, environment: Mapping[str, str] | None = None) -> int | None:
    """Run a command with its output in a file: its exit status, None where it was ended because it took too long.

    What it has started and left behind ends with it.

    Args:
        command: Program and arguments.
        log: The file.
        seconds: Its time.
        environment: Further variables of its environment.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **(environment or {}), "PYTHONUNBUFFERED": "1", "COLUMNS": "300"},
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest still sums up, a run ends its processes
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            return None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
