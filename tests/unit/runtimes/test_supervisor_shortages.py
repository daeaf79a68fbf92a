"""A supervisor that lacks descriptors, processes, a log or the program; a start that fails leaves nothing behind."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

from ormo_rpc.runtimes.distributed.launcher import supervisor as supervisor_module
from ormo_rpc.runtimes.distributed.launcher.supervisor import Supervisor
from tests.support.cgroups import group, needs_pids_groups
from tests.support.children import PRELUDE, descriptors, ended, start


def test_a_program_that_does_not_exist_leaves_no_descriptor() -> None:
    before = descriptors()
    with Supervisor() as supervisor, pytest.raises(FileNotFoundError):
        supervisor.start("child", ["/no/such/program"], env={}, log=None)
    assert descriptors() == before


def open_all() -> list[int]:
    """Open files until no descriptor is left."""
    opened = list[int]()
    with contextlib.suppress(OSError):
        while True:
            opened.append(os.open(os.devnull, os.O_RDONLY))
    return opened


def test_a_start_without_descriptors_fails_and_leaks_none(tmp_path: Path) -> None:
    """With 1, 2, 3 ... of them left, until there are enough: whichever of the pipes, the log or subprocess's finds none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    failed: list[int | None] = []
    with Supervisor() as supervisor:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(int(Path(file).name) for file in descriptors()) + 20, hard))
            filled = open_all()
            while True:
                os.close(filled.pop())
                try:
                    child = start(supervisor, "", tmp_path / "log")
                except OSError as error:
                    failed.append(error.errno)
                else:
                    break
                again = open_all()
                assert len(again) == len(failed)
                for descriptor in again:
                    os.close(descriptor)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in filled:
            os.close(descriptor)
        assert ended(supervisor, child) == 0
    assert set(failed) == {errno.EMFILE}
    assert len(failed) >= 5  # two pipes and the log at least


@needs_pids_groups
def test_a_start_beyond_the_limit_of_processes_fails_and_works_again_when_that_is_raised() -> None:
    """In a process of its own, which is alone in its control group."""
    script = f"""{PRELUDE}
import pathlib
module = runpy.run_path({supervisor_module.__file__!r})
group = pathlib.Path(sys.argv[1])
(group / "pids.max").write_text("1")
(group / "cgroup.procs").write_text(str(os.getpid()))
before = sorted(os.listdir("/proc/self/fd"))
with module["Supervisor"]() as supervisor:
    start = lambda: supervisor.start("it", [sys.executable, "-c", ""], env=dict(os.environ), log=None)
    try:
        start()
    except OSError as error:
        print(error.errno, len(supervisor.children), sorted(os.listdir("/proc/self/fd")) == before)
    (group / "pids.max").write_text("max")
    child = start()
    print(supervisor.wait(lambda: not child.running, 60), child.exit_code)
"""
    with group("pids") as limited:
        command = [sys.executable, "-c", script, str(limited.path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == (f"{errno.EAGAIN} 0 True\nTrue 0\n", 0), done.stderr


@pytest.mark.parametrize("what", ["a folder that was deleted", "a full disk"])
def test_a_log_that_cannot_be_opened_is_said_and_the_child_runs_without_it(what: str, tmp_path: Path) -> None:
    reported: list[str] = []
    log = tmp_path / "deleted" / "log" if what == "a folder that was deleted" else FullDisk(tmp_path / "log")
    with Supervisor(reported.append) as supervisor:
        child = start(supervisor, "import sys; print('lost'); sys.exit(3)", log, "worker 3")
        assert ended(supervisor, child) == 3
        assert child.exit_reason() == f"worker 3 (pid {child.process.pid}) exited with status 3"
    assert len(reported) == 1
    assert re.fullmatch(r"worker 3: its log cannot be written: \[Errno \d+\] .*; the run goes on without it", reported[0])


def test_the_end_of_a_child_whose_log_was_deleted_is_told(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Supervisor() as supervisor:
        child = start(supervisor, "print('lost', flush=True); import sys; sys.exit(3)", log)
        ended(supervisor, child)
        log.unlink()
        assert child.exit_reason() == f"child (pid {child.process.pid}) exited with status 3 (see {log})"


class FullDisk(type(Path())):
    """A path whose file system has no space."""

    @override
    def open(self, *args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
