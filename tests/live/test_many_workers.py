"""Elastic workers by the dozen: a server keeps nothing of those that were killed, and little for each that is there."""

from __future__ import annotations

import json
import re
import signal
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.elastic_worker import STAGES
from tests.support.processes import CALM, QUIET, events, launched, processes, summary, wait_until

pytestmark = [pytest.mark.live, pytest.mark.timeout(240)]
KILLED, TOGETHER = 20, 32
"""Workers that join and are killed one after another, and workers that are there at once."""
OWN_THREADS, OWN_DESCRIPTORS = 3, 3
"""Threads and descriptors that the server has at times, such as for a checkpoint that is written."""


@dataclass(frozen=True)
class Load:
    """The threads, descriptors and memory of a process.

    Attributes:
        threads: Its threads.
        descriptors: Its open descriptors.
        megabytes: Its memory, without what files are mapped to.
    """

    threads: int
    descriptors: int
    megabytes: float

    @classmethod
    def of(cls, pid: int) -> Load:
        """Look at a process."""
        folder = Path(f"/proc/{pid}")
        found = re.search(r"^RssAnon:\s+(\d+) kB$", (folder / "status").read_text(), re.MULTILINE)
        assert found
        threads, descriptors = (len(list((folder / name).iterdir())) for name in ("task", "fd"))
        return cls(threads, descriptors, int(found[1]) / 1000)

    def is_left(self, pid: int) -> bool:
        """Tell whether a process has no more threads and descriptors than these."""
        now = Load.of(pid)
        return now.threads <= self.threads + OWN_THREADS and now.descriptors <= self.descriptors + OWN_DESCRIPTORS


@contextmanager
def elastic_workers(run_dir: Path, address: str, *options: str) -> Generator[Any]:
    """Start elastic workers, with options of `tests.chaos.elastic_worker`."""
    where = ("--address", address, "--secret-file", str(run_dir / "secret"))
    with launched("-m", "tests.chaos.elastic_worker", *where, *options) as process:
        yield process


def kill_in_turn(run_dir: Path, address: str, count: int, stages: Sequence[str] = STAGES) -> None:
    """Let workers join, each of which is killed at one of the stages."""
    at = [word for stage in stages for word in ("--stage", stage)]
    with elastic_workers(run_dir, address, "--in-turn", str(count), *at) as workers:
        _, err = workers.communicate(timeout=120)
    assert workers.returncode == 0, err
    assert sum(" stage " in line for line in err.splitlines()) == count, err


def test_workers_that_were_killed_leave_nothing_in_the_server_and_many_work_at_once(tmp_path: Path) -> None:
    options = (*CALM, "workers=1", "train.epochs=100000", "transport=gloo")
    with launched("launch.py", f"hydra.run.dir={tmp_path}", *QUIET, *options) as host:
        known = processes(tmp_path)
        server, address = known["server"], known["address"]
        kill_in_turn(tmp_path, address, len(STAGES))  # all that is made once is there from now on
        wait_until(lambda: evictions(tmp_path) == len(STAGES), "the evictions")
        before = Load.of(server)
        kill_in_turn(tmp_path, address, KILLED - len(STAGES))
        wait_until(lambda: evictions(tmp_path) == KILLED, "the evictions")
        wait_until(lambda: before.is_left(server), "the end of what belonged to killed workers")
        assert Load.of(server).megabytes < before.megabytes + 4, (before, Load.of(server))

        seen = len(events(tmp_path))
        with elastic_workers(tmp_path, address, "--at-once", str(TOGETHER)) as workers:
            wait_until(lambda: len(at_work(events(tmp_path)[seen:])) == TOGETHER + 1, "gradients of all workers")
            full = Load.of(server)
            workers.send_signal(signal.SIGTERM)
            _, err = workers.communicate(timeout=60)
            assert workers.returncode == 0, err
        assert full.threads <= before.threads + 4 * TOGETHER, (before, full)
        assert full.descriptors <= before.descriptors + 12 * TOGETHER, (before, full)
        assert full.megabytes <= before.megabytes + 2 * TOGETHER, (before, full)
        wait_until(lambda: before.is_left(server), "the end of what belonged to workers that have left")
        host.send_signal(signal.SIGINT)
        _, err = host.communicate(timeout=60)
    assert host.returncode == 130, err
    assert len(summary(tmp_path)["evictions"]) == KILLED
    applied = events(tmp_path, "apply")
    assert [event["iteration"] for event in applied] == list(range(len(applied)))
    assert max(Counter(event["ticket"] for event in applied).values()) == 1


def at_work(found: Sequence[dict[str, Any]]) -> set[int]:
    """The workers whose gradients were applied."""
    return {event["worker"] for event in found if event["event"] == "apply"}


def evictions(run_dir: Path) -> int:
    """The evictions so far."""
    file = run_dir / "evictions.jsonl"
    return len([json.loads(line) for line in file.read_text().splitlines()]) if file.is_file() else 0
