"""Live runs that are short of descriptors and of memory, just when processes die."""

from __future__ import annotations

import re
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from ormo_rpc.runtimes.distributed.memory import PRELOADER, SERVER, WORKER
from tests.support.cgroups import Group, group, needs_memory_groups
from tests.support.processes import PATIENCE_SECONDS, QUIET, events, launched, processes, summary, wait_until

pytestmark = [pytest.mark.live, pytest.mark.timeout(180)]
EATER = """
import pathlib, sys
group = pathlib.Path(sys.argv[1])
(group / "cgroup.procs").write_text("0")
before, taken = (group / "memory.oom_control").read_text(), []
while (group / "memory.oom_control").read_text() == before:
    taken.append(bytearray(1 << 20))
"""
"""A process that takes memory of a control group until the kernel kills one there; it is no worker, so others come first."""


def take_all_memory(limited: Group) -> None:
    """Take the memory of a control group, which is a little more than it uses, until one of its processes is killed."""
    limited.set("memory.limit_in_bytes", int(limited.get("memory.usage_in_bytes")) + (16 << 20))
    subprocess.run([sys.executable, "-c", EATER, str(limited.path)], check=True, timeout=PATIENCE_SECONDS)
    limited.set("memory.limit_in_bytes", -1)


def oom_score(pid: int, launcher: psutil.Process) -> int:
    """The points that a process adds to the score of the launcher."""
    own, inherited = (int(Path(f"/proc/{number}/oom_score_adj").read_text()) for number in (pid, launcher.pid))
    return own - inherited


@needs_memory_groups
def test_a_run_outlives_a_launcher_without_descriptors_and_a_worker_that_is_killed_for_memory(tmp_path: Path) -> None:
    options = (f"hydra.run.dir={tmp_path}", *QUIET, "workers=2", "train.epochs=100000", "train.max_iterations=null")
    said: list[str] = []

    def read(process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        said.extend(iter(process.stderr.readline, ""))

    def told(pattern: str) -> re.Match[str]:
        return wait_until(lambda: re.search(pattern, "".join(said), re.MULTILINE), pattern)

    with group("memory") as limited, launched("launch.py", *options) as process:
        limited.add(process.pid)
        reader = threading.Thread(target=read, args=(process,))
        reader.start()
        pids = processes(tmp_path)
        launcher = psutil.Process(process.pid)
        assert [oom_score(pids["server"], launcher), oom_score(pids["workers"]["1"], launcher)] == [SERVER, WORKER]
        assert {oom_score(child.pid, launcher) for child in launcher.children()} == {SERVER, PRELOADER, WORKER}

        descriptors = launcher.rlimit(resource.RLIMIT_NOFILE)
        launcher.rlimit(resource.RLIMIT_NOFILE, (3, descriptors[1]))
        psutil.Process(pids["workers"]["1"]).kill()
        told(r"^launch\.py: worker 1 could not be started: Too many open files \(.*ulimit -n\); restarting it in 1 s ")
        launcher.rlimit(resource.RLIMIT_NOFILE, descriptors)
        wait_until(lambda: [event["worker"] for event in events(tmp_path, "join")].count(1) == 1, "its replacement")

        take_all_memory(limited)
        told(r"^launch\.py: worker \d \(pid \d+\) was killed by SIGKILL, by the kernel for lack of memory \(see .*; use fewer")
        wait_until(lambda: len(events(tmp_path, "join")) > 1, "the replacement of the one that was killed")
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_SECONDS) == 130
        reader.join()
    result = summary(tmp_path)
    killed = "was killed by SIGKILL"
    first, *others = [(eviction["process"], eviction["cause"]) for eviction in result["evictions"]]
    assert first == (pids["workers"]["1"], killed)
    assert others
    assert {cause for _, cause in others} == {f"{killed}, by the kernel for lack of memory"}
    assert result["incarnations"] == 1
    assert result["server_memory_bytes"] > result["worker_memory_bytes"] / 2 > 10 << 20
