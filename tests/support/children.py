"""Small children of a supervisor, for its tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ormo_rpc.runtimes import linux
from ormo_rpc.runtimes.distributed import starter
from ormo_rpc.runtimes.distributed.launcher import child as child_module
from ormo_rpc.runtimes.distributed.launcher.supervisor import ChildProcess, Supervisor
from tests.support.processes import PATIENCE_SECONDS

# The modules are run from their files, since importing the package takes a while.
PRELUDE = f"""
import json, os, runpy, signal, sys, threading, types
for name, file in {[(each.__name__, each.__file__) for each in (linux, starter, child_module)]!r}:
    child = runpy.run_path(file, run_name=name)
    sys.modules[name] = types.SimpleNamespace(**child)
"""
"""The first lines of a script that uses them."""


def start(supervisor: Supervisor, script: str, log: Path | None, name: str = "child") -> ChildProcess:
    """Start a script of Python."""
    return supervisor.start(name, [sys.executable, "-c", script], env=dict(os.environ), log=log)


def ended(supervisor: Supervisor, child: ChildProcess) -> int:
    """Wait for the end of a child, and return its exit status."""
    assert supervisor.wait(lambda: child.exit_code is not None, PATIENCE_SECONDS)
    assert child.exit_code is not None
    return child.exit_code


def descriptors() -> set[str]:
    """The open descriptors of this process."""
    return {str(path) for path in Path("/proc/self/fd").iterdir()}
