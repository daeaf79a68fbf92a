"""The watchdog: what it records of the workers that died, and of the memory that processes have."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ormo_rpc.config.runtimes import RpcRuntime
from ormo_rpc.runtimes.distributed.server_process import watchdog as module
from ormo_rpc.runtimes.distributed.server_process.watchdog import Watchdog
from ormo_rpc.storage.run_directory import RunDirectory
from tests.support.service import Owner, begun, owner


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The present time, which the test sets."""
    time = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: time[0])
    return time


@pytest.fixture
def directory(tmp_path: Path) -> Generator[RunDirectory]:
    with contextlib.closing(RunDirectory(tmp_path)) as directory:
        yield directory


def watchdog(there: Owner, directory: RunDirectory) -> Watchdog:
    return Watchdog(there.service, directory, RpcRuntime(), address="127.0.0.1:9", control="rpc", start="spawn")


def evict(there: Owner, worker: int, host: str | None = None) -> int:
    """Evict a worker, here or on a host; return its process id."""
    there.service.evict(there.memberships[worker], "its connection was closed")
    there.service.evictions[-1]["host"] = socket.gethostname() if host is None else host
    return there.memberships[worker].pid


def written(directory: RunDirectory) -> list[dict[str, Any]]:
    file = directory.path / "evictions.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize("told", ["before", "after"])
def test_the_cause_that_the_launcher_tells_stands_with_the_eviction(
    told: str, now: list[float], directory: RunDirectory
) -> None:
    there = owner(2)
    begun(there)
    watching = watchdog(there, directory)
    if told == "before":
        watching.explain(there.memberships[1].pid, "was killed by SIGKILL, by the kernel for lack of memory")
    pid = evict(there, 1)
    if told == "after":
        watching.write_evictions()
        assert written(directory) == []  # the launcher may tell in a moment
        now[0] += 0.1
        watching.explain(pid, "was killed by SIGKILL, by the kernel for lack of memory")
    watching.write_evictions()
    assert [(line["process"], line["reason"], line["cause"]) for line in written(directory)] == [
        (pid, "its connection was closed", "was killed by SIGKILL, by the kernel for lack of memory")
    ]
    assert there.service.evictions == written(directory)  # of the summary


def test_an_eviction_whose_cause_nobody_tells_is_written_a_moment_later_or_at_the_end(
    now: list[float], directory: RunDirectory
) -> None:
    there = owner(3)
    begun(there)
    watching = watchdog(there, directory)
    watching.explain(evict(there, 1, host="elsewhere"), "the end of another process with that number")
    watching.write_evictions()
    now[0] += module.CAUSE_SECONDS
    watching.write_evictions()
    evict(there, 2)
    watching.write_evictions()
    assert [line["worker"] for line in written(directory)] == [1]
    watching.write_evictions(wait=False)
    assert [(line["worker"], "cause" in line) for line in written(directory)] == [(1, False), (2, False)]


def test_memory_is_measured_a_while_after_the_start_and_the_largest_is_kept(
    now: list[float], monkeypatch: pytest.MonkeyPatch, directory: RunDirectory
) -> None:
    there = owner(4)
    begun(there)
    for membership in list(there.service.memberships.by_worker.values())[1:]:  # worker 0 is on another machine
        replaced = replace(membership, host=socket.gethostname())
        there.service.memberships.by_worker[membership.worker] = replaced
    sizes = {os.getpid(): 500, 1001: 100, 1002: 200, 1003: None}  # the last one has just ended
    monkeypatch.setattr(module, "proportional_bytes", lambda pid: sizes[pid])
    watching = watchdog(there, directory)
    watching.check()
    now[0] += module.FIRST_MEASUREMENT_SECONDS - 0.1
    watching.check()
    assert watching.memory == {}
    now[0] += 0.1
    watching.check()
    assert watching.memory == {"server_memory_bytes": 500, "worker_memory_bytes": 150}
    sizes |= {os.getpid(): 400, 1001: 300}
    now[0] += module.MEASUREMENT_SECONDS
    watching.check()
    assert watching.memory == {"server_memory_bytes": 500, "worker_memory_bytes": 250}
