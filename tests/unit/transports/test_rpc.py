"""transport=rpc beyond the contract: errors, repeated calls, several workers in one process, dtypes, and memory."""

from __future__ import annotations

from collections.abc import Mapping
from multiprocessing import forkserver
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from ormo_rpc import build_server
from ormo_rpc.compression import PushFormat
from ormo_rpc.compression.topk import TopK
from ormo_rpc.compression.wire_options import WireDtype
from ormo_rpc.control.torch_rpc import unavailable
from ormo_rpc.errors import ServerLost
from ormo_rpc.messages import Push, Reply
from ormo_rpc.models.flat import Layout
from ormo_rpc.runtimes.distributed.server_process.service import Service
from ormo_rpc.server.buffer_layout import BufferLayout
from ormo_rpc.transports.base import ReplySize
from ormo_rpc.transports.pending_replies import ReplyFuture
from ormo_rpc.transports.rpc import Rpc
from tests.support.processes import wait_until
from tests.support.schedule import normal
from tests.support.transport_peers import RecordingService, connected, started

pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(bool(unavailable()), reason=unavailable())]
NUMBERS: Mapping[str, Any] = {"worker": 0, "ticket": 1, "stamp": 1, "loss": 0.5, "samples": 8, "incarnation": 0}


@pytest.fixture(autouse=True, scope="module")
def _forkserver() -> None:  # pyright: ignore[reportUnusedFunction] # a fixture
    """Start the process that workers are forked from, which outlives each test."""
    forkserver.ensure_running()


def reply(params: Tensor, worker: int = 0, stamp: int = 1) -> Reply:
    return Reply(worker=worker, ticket=stamp, stamp=stamp, params=params, lr=0.1, steps=1, incarnation=0)


class Failing(RecordingService):
    """Fails at the first push, by no fault of its sender."""

    def push(self, session_id: str, push: Push) -> Any:
        """Fail or take note of it."""
        if not self.pushes:
            self.pushes.append(push)
            raise ZeroDivisionError("of this test")
        return super().push(session_id, push)


@pytest.mark.slow
def test_an_error_in_a_push_is_logged_and_reaches_its_worker(caplog: pytest.LogCaptureFixture) -> None:
    with connected(Rpc(), lambda _: Failing(5)) as (service, (worker,), _):
        payload = torch.zeros(service.push_format.size, dtype=torch.uint8)
        worker.push(NUMBERS, payload)
        with pytest.raises(ServerLost, match=r"ZeroDivisionError: of this test\Z"):
            worker.result()
        assert len(service.pushes) == 1, "it was repeated after a time-out"
        assert "a call could not be done" in caplog.text
        service.replies = [reply(torch.ones(5))]
        worker.push(NUMBERS, payload)
        assert worker.result().params.tolist() == [1.0] * 5


@pytest.mark.slow
def test_a_push_that_timed_out_is_repeated_and_applied_once() -> None:
    def service_of(_: Any) -> Service:
        made = build_server(algorithm="ormo", scheduler="sync", params=torch.zeros(5), num_workers=2, lr=0.1)
        return Service(made, lambda _: None)

    with connected(Rpc(), service_of, 2) as (service, workers, _):
        for worker in workers:
            worker.register()
        held = [worker.result() for worker in workers]
        for number, pause_seconds in ((0, 2.5), (1, 0.0)):  # worker 0 waits for longer than the time-out, which is 2 s
            numbers = {**NUMBERS, "worker": number, "ticket": held[number].ticket, "stamp": held[number].stamp}
            workers[number].push(numbers, torch.ones(5))
            assert not workers[number].done(pause_seconds)
        replies = [worker.result() for worker in workers]
        assert service.server.iteration == 2
        assert {each.ticket for each in replies} == {2, 3}
        assert torch.equal(replies[0].params, replies[1].params)


class Answering(RecordingService):
    """Answers the pushes of worker 1 with their own stamp; those of worker 0 wait."""

    def push(self, session_id: str, push: Push) -> Any:
        """Take note of it."""
        if push.worker == 1:
            self.replies = [reply(torch.full((5,), float(push.stamp)), worker=1, stamp=push.stamp)]
        return super().push(session_id, push)


@pytest.mark.slow
def test_two_workers_of_one_process_share_its_agent_and_wait_for_themselves() -> None:
    with connected(Rpc(), lambda _: Answering(5), 2, processes=1) as (service, workers, _):
        payload = torch.zeros(service.push_format.size, dtype=torch.uint8)
        workers[0].push(NUMBERS, payload)
        wait_until(lambda: service.open, "the push of worker 0")
        for stamp in range(20):
            workers[1].push({**NUMBERS, "worker": 1, "stamp": stamp}, payload)
            came = workers[1].result()
            assert (came.worker, came.stamp, came.params.tolist()) == (1, stamp, [float(stamp)] * 5)
        assert not workers[0].done()
        service.open[0].set_result(reply(torch.ones(5)))
        assert workers[0].result().worker == 0
        assert [transport for transport, _ in service.transports.values()] == ["rpc", "rpc"]


FORMATS: Mapping[str, Mapping[str, Any]] = {
    "float64": {"dtype": torch.float64},
    "bf16": {"dtype": torch.float32, "wire": WireDtype.bf16},
    "top-k": {"dtype": torch.float32, "compression": TopK(ratio=0.5)},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dimension", [1, 257])
def test_each_wire_form_crosses_and_shares_no_memory(name: str, dimension: int) -> None:
    params = torch.zeros(dimension, dtype=FORMATS[name]["dtype"])
    form = PushFormat(
        params=Layout({"params": params}),
        buffers=BufferLayout({"mean": torch.empty(3), "count": torch.zeros((), dtype=torch.int64)}),
        **FORMATS[name],
    )

    def service_of(_: Any) -> RecordingService:
        made = RecordingService(dimension)
        made.push_format, made.reply_size = form, ReplySize(params=params.nbytes, buffers=3)
        return made

    with connected(Rpc(), service_of) as (service, (worker,), _):
        payloads = [torch.zeros(form.size, dtype=torch.uint8) for _ in range(3)]
        for number, payload in enumerate(payloads):
            values, indices = form.regions[0]
            values.of(payload).copy_(normal(values.count, 5, number))
            indices.of(payload).copy_(torch.arange(indices.count))
            sent = normal(dimension, 6, number).to(params.dtype)
            service.replies = [reply(sent)]
            worker.push(NUMBERS, payload)
            came = worker.result()
            assert came.params.dtype == params.dtype
            assert torch.equal(came.params, sent)
        for payload, pushed in zip(payloads, service.pushes, strict=True):
            grad, buffers = form.unpack(payload)
            assert torch.equal(pushed.grad, grad)
            assert all(torch.equal(pushed.buffers[key], buffers[key]) for key in buffers)


KILLED, PUSHED = 20, 1000
BYTES_PER_KILL, BYTES_PER_PUSH = 100_000, 500
"""The most that the server's memory grows by, on average."""


class Answered(RecordingService):
    """Answers every push, and keeps none."""

    def push(self, session_id: str, push: Push) -> ReplyFuture:
        """Answer."""
        self.replies = [reply(torch.ones(5), worker=push.worker)]
        return self._reply()


@pytest.mark.slow
def test_neither_pushes_nor_workers_that_were_killed_make_the_server_grow() -> None:
    with connected(Rpc(), lambda _: Answered(5)) as (service, (worker,), _):
        payload = torch.zeros(service.push_format.size, dtype=torch.uint8)

        def push(count: int) -> None:
            for _ in range(count):
                worker.push(NUMBERS, payload)
                assert worker.result().stamp == 1

        def kill(count: int) -> None:
            for _ in range(count):
                (other,) = started(Rpc(), worker.address, [1], service.push_format.size)
                other.connect()
                other.push({**NUMBERS, "worker": 1}, payload)
                assert other.result().stamp == 1
                other.close()
                wait_until(lambda: len(service.memberships) == 1, "the eviction")

        push(300)
        kill(3)
        server, client = psutil.Process(), psutil.Process(worker.process.pid)
        before = server.memory_info().rss, client.memory_info().rss
        push(PUSHED)
        after = server.memory_info().rss, client.memory_info().rss
        grown = [(b - a) / PUSHED for a, b in zip(before, after, strict=True)]
        assert max(grown) < BYTES_PER_PUSH, grown
        kill(KILLED)
        grown = [(server.memory_info().rss - after[0]) / KILLED]
        assert grown[0] < BYTES_PER_KILL, grown
