"""The comparison of starts: what is read from a run, and the report."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import pytest

from benchmarks import startup, startup_parts
from tests.unit.benchmarks.made_up import content


def event(kind: str, seconds: float, **more: Any) -> str:
    return json.dumps({"event": kind, "seconds": seconds, **more})


def applied(iteration: int, worker: int, seconds: float) -> str:
    return event("apply", seconds, iteration=iteration, worker=worker)


def test_a_replacement_is_timed_from_the_newest_gradient_at_the_kill_to_its_own_first_one() -> None:
    lines = [
        json.dumps({"event": "header"}),
        applied(0, 1, 0.5),
        applied(1, 0, 1.0),  # two gradients had been applied when worker 1 was killed
        applied(2, 1, 1.1),  # its last push was under way
        event("leave", 1.2, worker=1),
        applied(3, 0, 2.0),
        event("join", 3.0, worker=1),
        applied(4, 0, 3.1),
    ]
    assert startup_parts.first_of_replacement(lines, 1, applied=2) is None
    assert startup_parts.first_of_replacement([*lines, applied(5, 1, 3.5)], 1, applied=2) == pytest.approx(2.5)


def test_memory_is_that_of_a_process_and_of_all_that_it_has_started() -> None:
    # A page counts in each process by its share: with a copy of this process all is about what it was before the copy.
    block = bytearray(os.urandom(1 << 16)) * 1024  # 64 MiB, written before the copy is made
    alone = startup_parts.bytes_of_all(os.getpid())
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    try:
        together = startup_parts.bytes_of_all(os.getpid())
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert len(block) < alone
    assert together == pytest.approx(alone, rel=0.1)


def test_the_report_has_medians_and_how_many_times_faster() -> None:
    found = [
        {"checkout": name, "round": number, "load": 0.5, "figures": {"default run": seconds}}
        for name, times in (("before", (10.0, 12.0, 11.0)), ("after", (4.0, 5.5, 6.0)))
        for number, seconds in enumerate(times)
    ]
    found.append({"checkout": "before", "round": 0, "load": 0.5, "figures": {}, "failure": "memory: before: no memory"})
    made = {**content(found, {}), "before": "abc", "after": "def+changes"}
    text = startup.as_text(made)
    assert "Before: abc. After: def+changes." in text
    assert (
        "| default run | 11.00 (10.00 - 12.00) | 5.50 (4.00 - 6.00) | 2.0 | 3 |\n\nNot measured: memory: before: no memory\n"
        in text
    )
