"""Faults happen at the push, the iteration or the place in joining that they name, and as often as they say."""

from __future__ import annotations

import math
import os
import re
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ormo_rpc.config.parsing import parse_config
from ormo_rpc.errors import ConfigError
from ormo_rpc.worker import faults as module
from ormo_rpc.worker.faults import CONNECT, JOIN, Fault, FaultInjector

PUSHES = 12


class Machine:
    """In place of `os.kill`, `time` and timers: notes the signals and sleeps, and the seconds after which a signal comes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.signals: list[int] = []
        self.slept: list[float] = []
        self.later: list[float] = []
        monkeypatch.setattr(os, "kill", lambda _pid, number: self.signals.append(number))
        monkeypatch.setattr(module, "time", self)
        monkeypatch.setattr(threading, "Timer", self._timer)

    def sleep(self, seconds: float) -> None:
        """Note it."""
        self.slept.append(seconds)

    def _timer(self, seconds: float, function: Callable[..., None], arguments: tuple[int, int]) -> threading.Thread:
        """A thread that calls the function at once."""
        self.later.append(seconds)
        return threading.Thread(target=function, args=arguments)


def run_worker(words: list[str], worker: int, restart_count: int = 0) -> tuple[list[str], list[int], list[int]]:
    """Let a worker push; return the messages of its faults, the corrupt pushes, and those whose reply was dropped."""
    reported: list[str] = []
    injector = FaultInjector(words, worker, restart_count, reported.append)
    corrupt: list[int] = []
    dropped: list[int] = []
    for push in range(PUSHES):
        payload = torch.ones(3)
        injector.before_push(payload)
        if payload.isnan().all():
            corrupt.append(push)
        if injector.drops_reply():
            dropped.append(push)
    return reported, corrupt, dropped


def test_each_fault_of_a_worker_fires_once_at_its_push(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    words = ["kill@1:3", "stop@1:5", "delay@1:7:2.5", "drop_reply@1:8", "corrupt@1:9:2", "kill@0:1", "kill@server:2"]
    reported, corrupt, dropped = run_worker(words, 1)
    assert reported == [
        *("fault kill@1:3", "fault stop@1:5", "fault delay@1:7:2.5", "fault drop_reply@1:8"),
        *("fault corrupt@1:9:2, push 9", "fault corrupt@1:9:2, push 10"),
    ]
    assert machine.signals == [signal.SIGKILL, signal.SIGSTOP]
    assert machine.slept == [2.5]
    assert (corrupt, dropped) == ([9, 10], [8])


def test_a_restarted_process_has_no_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    assert run_worker(["kill@1:3", "corrupt@1:4", "drop_reply@1:5"], 1, restart_count=1) == ([], [], [])
    assert machine.signals == []


def test_the_faults_of_the_server_fire_at_their_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    reported: list[str] = []
    injector = FaultInjector(["kill@server:2", "kill@2:3", "stop@server:5"], None, 0, reported.append)
    for iteration in (1, 2, 2, 3, 5):
        injector.applied(iteration)
    assert machine.signals == [signal.SIGKILL, signal.SIGSTOP]
    assert reported == ["fault kill@server:2", "fault stop@server:5"]


def test_the_faults_of_a_worker_that_joins_fire_once_at_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    reported: list[str] = []
    injector = FaultInjector(["stop@1:join", "kill@1:connect", "kill@1:0", "kill@2:join"], 1, 0, reported.append)
    for place in (JOIN, CONNECT, JOIN):
        injector.joining(place)
    assert machine.signals == [signal.SIGSTOP, signal.SIGKILL]
    assert reported == ["fault stop@1:join", "fault kill@1:connect"]


def test_a_worker_can_be_killed_while_its_push_is_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    assert run_worker(["kill@1:3:0.002"], 1)[0] == ["fault kill@1:3:0.002"]
    assert machine.later == [0.002]


@pytest.mark.parametrize(
    "word",
    [
        *("", "kill", "kill@1", "kill@:3", "kill@-1:3", "sneeze@1:3", "delay@server:3", "kill@1:3:x"),
        *("delay@1:join", "kill@server:join", "kill@1:leave"),
    ],
)
def test_a_malformed_fault_is_refused_with_the_configuration(word: str) -> None:
    with pytest.raises(ValueError, match=rf"\Aruntime\.faults: got {re.escape(repr(word))}, expected KIND@WORKER:PUSH"):
        Fault.parse(word)
    with pytest.raises(ConfigError, match=r"\Aruntime\.faults: got .*, expected words KIND@WORKER:PUSH"):
        parse_config({"runtime": {"faults": [word]}})


def test_a_fault_prints_as_it_is_parsed() -> None:
    for word in (
        "kill@1:3",
        "kill@1:3:0.5",
        "delay@0:5:2.5",
        "stop@server:100",
        "corrupt@7:0:20",
        "kill@1:join",
        "stop@2:connect",
    ):
        assert str(Fault.parse(word)) == word


def test_a_corrupt_payload_is_all_nan() -> None:
    payload: Any = torch.ones(4)
    FaultInjector(["corrupt@0:0"], 0, 0, lambda _: None).before_push(payload)
    assert all(math.isnan(value) for value in payload.tolist())
