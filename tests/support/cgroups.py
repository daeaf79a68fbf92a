"""Control groups of Linux for tests: processes whose memory or number is limited."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Generator
from pathlib import Path

import psutil
import pytest

_ROOT = Path("/sys/fs/cgroup")
_count = itertools.count()


class Group:
    """A control group of one controller, of version 1, within that of this process.

    Args:
        controller: Its name.
    """

    def __init__(self, controller: str) -> None:
        self.name = f"{_own(controller).rstrip('/')}/ormo_rpc_test_{os.getpid()}_{next(_count)}"
        self.path = _ROOT / controller / self.name.lstrip("/")

    def add(self, pid: int) -> None:
        """Move a process into it, with all that it starts from now on."""
        (self.path / "cgroup.procs").write_text(str(pid))

    def set(self, name: str, value: object) -> None:
        """Set one of its values."""
        (self.path / name).write_text(str(value))

    def get(self, name: str) -> str:
        """Read one of its values."""
        return (self.path / name).read_text()


def _own(controller: str) -> str:
    """The control group of this process, as the kernel writes it."""
    lines = (line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines())
    return next((name for _, controllers, name in lines if controller in controllers.split(",")), "")


def _needs(controller: str) -> pytest.MarkDecorator:
    file = _ROOT / controller / _own(controller).lstrip("/") / "cgroup.procs"
    writable = os.getuid() == 0 and file.is_file()
    return pytest.mark.skipif(not writable, reason=f"needs root, and the {controller} controller of control groups, version 1")


needs_memory_groups, needs_pids_groups = _needs("memory"), _needs("pids")
"""Marks of tests that make such groups."""


@contextlib.contextmanager
def group(controller: str) -> Generator[Group]:
    """Make a control group, and remove it when its processes have ended, which is the test's to see to."""
    made = Group(controller)
    made.path.mkdir()
    try:
        yield made
    finally:
        for pid in map(int, made.get("cgroup.procs").split()):
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(pid).kill()
        deadline = time.monotonic() + 10
        while made.get("cgroup.procs").split() and time.monotonic() < deadline:
            time.sleep(0.01)
        made.path.rmdir()
