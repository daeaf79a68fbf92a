"""Process groups over shared values, and the check of the initial parameters that they make; ranks are threads here."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import distributed, nn
from typing_extensions import override

from ormo_rpc.config.parsing import parse_config
from ormo_rpc.errors import Refused
from ormo_rpc.runtimes import start_check
from ormo_rpc.runtimes.collectives import MAX_VALUES_PER_RANK, SharedStore, SharedValues, gather, process_group
from ormo_rpc.runtimes.job import Job
from ormo_rpc.runtimes.start_check import StartCheck
from tests.support.processes import PATIENCE_SECONDS, wait_until

EQUAL, OTHER, THIRD = b"\x01" * 32, b"\x02" * 32, b"\x03" * 32


def gloo_threads() -> list[str]:
    """The names of this process's threads that are Gloo's."""
    names: list[str] = []
    for task in Path("/proc/self/task").iterdir():
        try:
            names.append((task / "comm").read_text().strip())
        except OSError:  # it has ended
            continue
    return [name for name in names if "gloo" in name]


def in_ranks(size: int, work: Callable[[int, SharedStore], Any], values: SharedValues | None = None) -> list[Future[Any]]:
    """Do work in all ranks at once, each with a store of its own; return the outcomes."""
    call = (values or SharedValues(size)).answer
    given_up = threading.Event()
    with ThreadPoolExecutor(size) as pool:
        return [
            pool.submit(work, rank, SharedStore(call, size, timeout_seconds=PATIENCE_SECONDS, given_up=given_up))
            for rank in range(size)
        ]


def test_a_group_gathers_a_value_of_every_rank_and_leaves_nothing_behind() -> None:
    """No thread, no descriptor; meanwhile its ports are on loopback, and the rest of the process finds no group."""
    process = psutil.Process()
    seen: dict[str, Any] = {}
    before = process.num_fds()
    here = {each.laddr for each in process.net_connections() if each.status == psutil.CONN_LISTEN}

    def work(rank: int, store: SharedStore) -> list[bytes]:
        with process_group(store, rank, 3, host="127.0.0.1", timeout_seconds=PATIENCE_SECONDS) as group:
            if rank == 0:
                connections = process.net_connections()
                seen["hosts"] = {
                    each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN and each.laddr not in here
                }
                seen["threads"] = gloo_threads()
                seen["initialized"] = distributed.is_initialized()
            return gather(group, bytes([rank] * 32))

    assert [each.result() for each in in_ranks(3, work)] == [[bytes([rank] * 32) for rank in range(3)]] * 3
    assert seen["hosts"] == {"127.0.0.1"}
    assert seen["threads"]
    assert not seen["initialized"]
    assert not gloo_threads()
    assert process.num_fds() == before


def test_a_rank_that_is_gone_ends_the_operation_of_the_others() -> None:
    def work(rank: int, store: SharedStore) -> str:
        try:
            with process_group(store, rank, 3, host="127.0.0.1", timeout_seconds=PATIENCE_SECONDS) as group:
                if rank < 2:
                    gather(group, EQUAL)
        except RuntimeError as error:
            return str(error)
        return "not waited for"

    began = time.monotonic()
    first, second, third = (each.result() for each in in_ranks(3, work))
    assert third == "not waited for"
    for each in (first, second):
        assert re.search("closed by peer|reset by peer", each), each
    assert time.monotonic() - began < PATIENCE_SECONDS / 2
    assert not gloo_threads()


def test_shared_values_come_once_and_only_the_new_ones() -> None:
    values = SharedValues(2)
    assert values.answer({"key": "a", "value": "01"}) == {}
    assert values.answer({"known": 0}) == {"values": {"a": "01"}}
    values.answer({"key": "b", "value": "02"})
    assert values.answer({"known": 1}) == {"values": {"b": "02"}}
    assert values.answer({"known": 2}) == {"values": {}}
    values.close()
    with pytest.raises(ValueError, match=r"\Acollectives: this group is closed\Z"):
        values.answer({"known": 2})


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"known": -1},
        {"known": "0"},
        {"known": True},
        {"key": "a"},
        {"key": "a", "value": None},
        {"key": "", "value": "01"},
        {"key": "kept", "value": "02"},
        {"key": "a" * 5000, "value": "01"},
        {"key": "a", "value": "0" * 5000},
    ],
    ids=str,
)
def test_a_malformed_request_is_refused(request_: Mapping[str, Any]) -> None:
    values = SharedValues(2)
    values.answer({"key": "kept", "value": "01"})
    with pytest.raises(
        ValueError, match=r"\Acollectives: got a malformed request, expected a new key with its value, or a number\Z"
    ):
        values.answer(request_)
    assert values.answer({"known": 0}) == {"values": {"kept": "01"}}


def test_shared_values_are_bounded() -> None:
    values = SharedValues(2)
    for number in range(2 * MAX_VALUES_PER_RANK):
        values.answer({"key": str(number), "value": "01"})
    with pytest.raises(ValueError, match="malformed"):
        values.answer({"key": "more", "value": "01"})


def test_a_value_that_does_not_come_is_waited_for_until_the_time_out() -> None:
    store = SharedStore(SharedValues(2).answer, 2, timeout_seconds=0.05, given_up=threading.Event())
    store.set("mine", "text")
    assert store.get("mine") == b"text"
    with pytest.raises(TimeoutError, match=r"\Aa rank did not come within 0\.05 s\Z"):
        store.get("another")


def checks(digests: list[bytes], size: int | None = None, machines: Sequence[bytes] = ()) -> list[StartCheck]:
    """Begin the check in the first ranks, by default all, on machines of one kind unless others are given."""
    size = size or len(digests)
    call = SharedValues(size).answer
    options: dict[str, Any] = {"host": "127.0.0.1", "timeout_seconds": PATIENCE_SECONDS}
    return [
        StartCheck(rank, size, lambda digest=digest: digest, call, **options, machine=machine)
        for rank, (digest, machine) in enumerate(zip(digests, machines or [EQUAL] * len(digests), strict=True))
    ]


def test_ranks_with_the_same_initial_values_pass(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for check in checks([EQUAL] * 3):
            check.finish(PATIENCE_SECONDS)
    assert caplog.messages == ["all 3 processes have the same initial parameters"] * 3


def test_a_rank_that_differs_from_the_server_is_refused_and_every_rank_that_does_is_named() -> None:
    server, same, *different = checks([EQUAL, EQUAL, OTHER, THIRD])
    server.finish(PATIENCE_SECONDS)
    same.finish(PATIENCE_SECONDS)
    for check in different:
        with pytest.raises(Refused) as caught:
            check.finish(PATIENCE_SECONDS)
        assert str(caught.value) == (
            "model: the initial parameters of rank 2 (worker 1), rank 3 (worker 2) differ from those of rank 0 (the "
            "server); every process must make the same: draw from torch, random or numpy.random, which are seeded"
        )


def test_a_rank_that_differs_on_another_kind_of_machine_is_not_refused(caplog: pytest.LogCaptureFixture) -> None:
    """Its processor may round a draw differently, and every reply has the server's parameters."""
    with caplog.at_level(logging.INFO):
        for check in checks([EQUAL, OTHER], machines=[EQUAL, THIRD]):
            check.finish(PATIENCE_SECONDS)
    said = "the processors or the torch of rank 1 (worker 0) make other initial parameters; the server's count"
    assert caplog.messages == [said, said]


def test_a_rank_that_never_comes_is_not_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for check in checks([EQUAL, EQUAL], size=3):
            check.finish(0.05)
        wait_until(lambda: not gloo_threads(), "the end of both groups")
    said = "the initial parameters of all processes were not compared: a process has died, or is late"
    assert caplog.messages == [said, said]


def test_a_server_that_makes_no_check_is_not_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(_: Mapping[str, Any]) -> Mapping[str, Any]:
        raise Refused("collectives: this group is closed")

    with caplog.at_level(logging.INFO):
        StartCheck(1, 2, lambda: OTHER, refuse, host="127.0.0.1", timeout_seconds=PATIENCE_SECONDS).finish(PATIENCE_SECONDS)
    assert caplog.messages == [
        "the initial parameters of all processes were not compared: Refused: collectives: this group is closed"
    ]


def test_a_hash_that_is_not_ready_in_time_is_not_compared(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters may change once training begins, so a hash that is made beside it says nothing."""
    loaded = threading.Event()

    def slow() -> bytes:
        assert loaded.wait(PATIENCE_SECONDS)
        return OTHER

    monkeypatch.setattr(start_check, "process_group", None)  # not to be called
    check = StartCheck(1, 2, slow, SharedValues(2).answer, host="127.0.0.1", timeout_seconds=PATIENCE_SECONDS)
    with caplog.at_level(logging.INFO):
        check.finish(0.0)
        loaded.set()
        wait_until(lambda: not any(each.name == "start check" for each in threading.enumerate()), "the end of the check")
        check.finish(PATIENCE_SECONDS)
    assert caplog.messages == ["the initial parameters of all processes were not compared: a process has died, or is late"]


class Net(nn.Module):
    """A layer and a buffer, with what is added to each of them."""

    def __init__(self, parameter: float = 0.0, buffer: float = 0.0) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.register_buffer("offset", torch.full((64,), buffer))
        self.offset: torch.Tensor
        with torch.no_grad():
            self.layer.weight[0, 0] += parameter

    @override
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs.flatten(1) + self.offset)


def digest(parameter: float = 0.0, buffer: float = 0.0) -> bytes:
    """The hash of a job's initial values."""
    model = {"_target_": "tests.unit.runtimes.test_collectives.Net", "parameter": parameter, "buffer": buffer}
    return Job(parse_config({"workers": 1, "model": model})).initial_digest()()


def test_the_hash_is_of_the_initial_parameters() -> None:
    """Not of buffers, which come with every reply and need not agree."""
    assert len(digest()) == 32
    assert digest() == digest(buffer=0.5)
    assert digest() != digest(parameter=0.5)


def test_the_hash_is_that_of_the_initial_values_also_when_the_model_is_used_meanwhile() -> None:
    job = Job(parse_config({"workers": 1, "model": {"_target_": "tests.unit.runtimes.test_collectives.Net"}}))
    later = job.initial_digest()
    model = job.model()  # the one that is hashed
    model.bind(torch.zeros(model.params.size))
    assert later() == digest()
