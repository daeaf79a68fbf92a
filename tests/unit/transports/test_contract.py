"""The contract of transports, for each that is registered: a new one is tested by being registered."""

from __future__ import annotations

import math
import os
import random
import signal
import threading
import time
from dataclasses import replace
from multiprocessing import forkserver
from typing import Any

import pytest
import torch
from typing_extensions import override

from ormo_rpc import build_server
from ormo_rpc.errors import PushRefused, Refused, ServerLost, StaleSession
from ormo_rpc.kernels.compiled import fastest_kernel
from ormo_rpc.kernels.host_copies import on_host
from ormo_rpc.kernels.pool import WORTH_POOLING, pooled
from ormo_rpc.messages import Push, Reply, number_fields
from ormo_rpc.options import parts
from ormo_rpc.runtimes.distributed.server_process.gpu_memory import GpuSide
from ormo_rpc.runtimes.distributed.server_process.service import Service
from ormo_rpc.server.parameter_server import ParameterServer
from ormo_rpc.transports.base import ServerSide, Transport
from ormo_rpc.transports.shm import SharedMemory
from tests.support.contract import same
from tests.support.gpu_paths import ON_HOST
from tests.support.processes import wait_until
from tests.support.schedule import normal
from tests.support.transport_peers import RecordingService, Worker, connected, server_process, started

pytestmark = pytest.mark.timeout(120)
SMALL, LARGE = 5, WORTH_POOLING // 4 + 1
"""Parameters that come behind a message everywhere, and that lie in shared memory where there is any."""
HUGE = 4_000_000
"""More than the system keeps for a worker that does not read."""
WORKERS = 2
BUFFER_BYTES = (3, 70_001, 1, 8)
"""Of each reply in turn; an odd number is no multiple of anything."""
GPUS: list[torch.device] = []
"""The GPU that services have their parameters on, where they are to have one; references stay on the CPU."""
STOP = Reply(worker=0, ticket=None, stamp=9, params=torch.empty(0), lr=0.0, steps=1, incarnation=0)


@pytest.fixture(autouse=True, scope="module")
def _forkserver() -> None:  # pyright: ignore[reportUnusedFunction] # a fixture
    """Start the process that workers are forked from, which outlives each test."""
    forkserver.ensure_running()


@pytest.fixture(params=sorted(parts("transport")))
def transport(request: pytest.FixtureRequest) -> Transport:
    """Each transport that is registered; those of GPUs with memory of the CPU."""
    cls: type[Transport] = {**parts("transport"), **ON_HOST}[request.param]
    if cls.unavailable():
        pytest.skip(cls.unavailable())
    return cls()


def numbers_of(message: type[Push] | type[Reply], rng: random.Random) -> dict[str, Any]:
    """Any number for each field."""
    return {
        field.name: rng.uniform(-1e300, 1e300) if field.type is float else rng.randrange(-(2**62), 2**62)
        for field in number_fields(message)
    }


@pytest.mark.slow
@pytest.mark.parametrize("dimension", [SMALL, LARGE], ids=["small", "large"])
def test_all_of_a_push_and_of_its_reply_crosses(transport: Transport, dimension: int) -> None:
    rng = random.Random(3)
    with connected(transport, lambda _: RecordingService(dimension)) as (service, (worker,), _):
        form = service.push_format
        for ticket in range(4):
            payload = normal(form.size // 4, 5, ticket).float()
            numbers = numbers_of(Push, rng) | ({"loss": None} if ticket == 1 else {})
            reply = Reply(
                **numbers_of(Reply, rng),
                params=normal(dimension, 6, ticket).to((torch.float32, torch.bfloat16)[ticket % 2]),
                buffers=torch.frombuffer(bytearray(rng.randbytes(BUFFER_BYTES[ticket])), dtype=torch.uint8),
            )
            service.replies = [reply if ticket < 3 else STOP]
            worker.push(numbers, payload)
            came = worker.result()
            expected = reply if ticket < 3 else STOP
            assert {field.name: getattr(came, field.name) for field in number_fields(Reply)} == {
                field.name: getattr(expected, field.name) for field in number_fields(Reply)
            }
            assert torch.equal(came.params.float(), expected.params.float())
            assert torch.equal(came.buffers, expected.buffers)
            assert came.params.dtype == (expected.params.dtype if ticket < 3 else came.params.dtype)
            pushed = service.pushes[-1]
            assert {name: getattr(pushed, name) for name in numbers} == numbers
            assert torch.equal(pushed.grad, payload[:dimension])
            reported = form.unpack(payload.view(torch.uint8))[1]
            assert pushed.buffers.keys() == reported.keys()
            assert all(torch.equal(value, reported[name]) for name, value in pushed.buffers.items())


@pytest.mark.slow
def test_a_reply_that_is_held_back_crosses_when_it_is_due(transport: Transport) -> None:
    with connected(transport, lambda _: RecordingService(SMALL)) as (service, (worker,), _):
        worker.register()
        wait_until(lambda: service.registered == [worker.session_id], "the call")
        assert not worker.done(2.5)  # longer than the time-out of one exchange, after which rpc repeats a call
        assert len(service.registered) == 1 or transport.name == "rpc", (
            "a stream or a pair waits for as long as the lease holds"
        )
        for future in service.open:
            future.set_result(STOP)
        assert worker.result().stamp == STOP.stamp


def test_a_worker_leaves_and_connects_again(transport: Transport) -> None:
    with connected(transport, lambda _: RecordingService(SMALL)) as (service, (worker,), _):
        first = worker.session_id
        worker.leave()
        assert worker.result() is None
        wait_until(lambda: service.left == [first], "the call")
        worker.connect_again()
        second = worker.connect()
        assert second != first
        service.replies = [STOP]
        worker.register()
        assert worker.result().ticket is None
        assert service.registered == [second]


class CopyingService(RecordingService):
    """Sends copies that lie in memory which is lent, as a server on a GPU does.

    Args:
        side: The server's half.
    """

    def __init__(self, side: ServerSide) -> None:
        super().__init__(LARGE)
        self._empty = pooled(side.memory)
        self.places: list[int] = []
        """The addresses of the copies."""

    @override
    def on_host(self, reply: Reply) -> Reply:
        copied = self._empty(reply.params).copy_(reply.params)
        self.places.append(copied.data_ptr())
        return replace(reply, params=copied)


def test_parameters_in_shared_memory_are_left_alone_until_their_worker_pushes() -> None:
    rng = random.Random(3)
    with connected(SharedMemory(), CopyingService, WORKERS) as (service, workers, _):
        for number in (0, 1, 1, 1, 0):
            service.replies = [Reply(**numbers_of(Reply, rng), params=normal(LARGE, 6, 0).float())]
            workers[number].push(numbers_of(Push, rng), torch.zeros(service.push_format.size, dtype=torch.uint8))
            workers[number].result()
        assert service.places[0] not in service.places[1:4]
        assert service.places[0] == service.places[4]


def test_a_server_that_has_ended_raises_server_lost(transport: Transport) -> None:
    with connected(transport, lambda _: RecordingService(SMALL)) as (_service, (worker,), end_server):
        end_server()
        worker.register()
        with pytest.raises(ServerLost):
            worker.result()
        worker.leave()
        assert worker.result() is None  # which is no error


def server(
    dimension: int = LARGE, num_workers: int = WORKERS, device: torch.device | None = None, **options: Any
) -> ParameterServer:
    params = normal(dimension, 7, 0).float().to(device or "cpu")
    kernel = None if device is None else fastest_kernel(dimension, device)
    return build_server(algorithm="ormo", params=params, num_workers=num_workers, lr=0.1, kernel=kernel, **options)


def real_service(side: ServerSide, **options: Any) -> Service:
    if GPUS:
        made = server(**options, device=GPUS[0])
        return Service(made, lambda _: None, max_not_finite=2, gpu=GpuSide(GPUS[0], side.memory))
    made = server(**options)
    if side.memory is not None:
        made.algorithm.kernel = replace(made.algorithm.kernel, empty=pooled(side.memory))
    return Service(made, lambda _: None, max_not_finite=2)


def answering(reply: Reply, **other: Any) -> dict[str, Any]:
    """The numbers of the push that answers a reply."""
    numbers = {"worker": reply.worker, "ticket": reply.ticket, "stamp": reply.stamp, "incarnation": reply.incarnation}
    return {**numbers, "loss": 0.5, "samples": 8, **other}


@pytest.mark.parametrize(("scheduler", "processes"), [("async", WORKERS), ("sync", 1)])
def test_replies_and_state_are_those_in_process(transport: Transport, scheduler: str, processes: int) -> None:
    """Under sync each worker waits for the other one; both are in one process, as with ``worker.prefetch``."""
    reference, rng = server(scheduler=scheduler), random.Random(4)

    def make(side: ServerSide) -> Service:
        return real_service(side, scheduler=scheduler)

    with connected(transport, make, WORKERS, processes=processes) as (service, workers, _):
        for worker in workers:
            worker.register()
        due, held = reference.start(), dict[int, Reply]()
        for _ in range(12):
            for reply in due:
                came = workers[reply.worker].result()
                assert answering(came) == answering(reply)
                assert torch.equal(came.params, reply.params)
                held[reply.worker] = came
            came = held.pop(rng.choice(sorted(held)))
            assert came.ticket is not None
            grad = 0.1 * normal(LARGE, 3, came.ticket).float()
            workers[came.worker].push(answering(came), grad)
            due = reference.receive(Push(**answering(came), grad=grad))
            iteration = reference.iteration
            wait_until(lambda: service.server.iteration == iteration, "the update", every_seconds=0.001)  # noqa: B023 - at once
        with service.lock:
            assert same(on_host(service.server.state_dict(replies=True)), reference.state_dict(replies=True))


def test_a_refused_push_changes_nothing_and_raises_its_error_at_the_worker(transport: Transport) -> None:
    with connected(transport, real_service, WORKERS) as (service, workers, _):
        for worker in workers:
            worker.register()
        reply, _other = [worker.result() for worker in workers]
        before, grad = on_host(service.server.state_dict(replies=True)), normal(LARGE, 3, 0).float()
        for other, error, text in (
            ({"worker": 1}, PushRefused, "worker: got 1, expected 0, the session's"),
            ({"ticket": 77}, PushRefused, "ticket: got 77"),
            ({"ticket": -(2**63)}, PushRefused, "ticket: got a number of 64 bits"),
            ({"stamp": 10**6}, PushRefused, "stamp"),
            ({"samples": 0}, PushRefused, "samples: got 0, expected at least 1"),
            ({"incarnation": 8}, StaleSession, "incarnation: got 8, expected 0"),
        ):
            workers[0].push(answering(reply, **other), grad)
            with pytest.raises(error, match=text) as caught:
                workers[0].result()
            assert caught.type is error
            assert same(on_host(service.server.state_dict(replies=True)), before)
        workers[0].push(answering(reply, loss=math.nan), grad)
        assert workers[0].result().ticket == 2  # it is settled: its ticket goes to another worker
        workers[0].push(answering(reply), grad)
        assert workers[0].result().ticket == 2  # the first word about a ticket counts


def test_a_worker_that_is_evicted_while_it_waits_gets_the_reason(transport: Transport) -> None:
    with connected(transport, lambda side: real_service(side, scheduler="sync"), WORKERS) as (service, workers, _):
        workers[0].register()
        wait_until(lambda: len(service.barrier.registered) == 1, "the call")
        service.evict(service.memberships.by_worker[0], "of this test")
        with pytest.raises(StaleSession, match=r"\Aworker 0 was evicted: of this test; rejoin\Z"):
            workers[0].result()


@pytest.mark.slow
def test_workers_that_die_or_are_evicted_while_stopped_harm_no_other(transport: Transport) -> None:
    """A worker dies while the server waits for its push, one while it is sent a reply, and one goes on after it was evicted."""
    options = {"dimension": HUGE, "scheduler": "sync", "num_workers": 3}
    with connected(transport, lambda side: real_service(side, **options), 3) as (service, workers, _):
        members, threads = service.memberships.by_worker, threading.active_count()
        for worker in workers:
            worker.register()
        replies = [worker.result() for worker in workers]
        computes, receives, last = workers

        computes.process.kill()
        wait_until(lambda: len(members) == 2, "the eviction of the worker that computes")

        receives.push(answering(replies[1]), normal(HUGE, 3, 1).float())
        wait_until(lambda: service.server.iteration == 1, "its push")
        os.kill(receives.process.pid, signal.SIGSTOP)
        last.push(answering(replies[2]), normal(HUGE, 3, 2).float())
        reply = last.result()  # the replies of both are due with it: the one is not held up by the other
        receives.process.kill()
        wait_until(lambda: len(members) == 1, "the eviction of the worker that receives")

        last.push(answering(reply), normal(HUGE, 3, 3).float())
        reply = last.result()
        os.kill(last.process.pid, signal.SIGSTOP)
        service.evict(members[2], "of this test")
        os.kill(last.process.pid, signal.SIGCONT)
        last.push(answering(reply), normal(HUGE, 3, 4).float())
        with pytest.raises((StaleSession, ServerLost)):
            last.result()
        last.connect_again()
        last.connect()
        last.register()
        assert last.result().ticket is not None
        wait_until(lambda: threading.active_count() <= threads, "the end of their threads")


def test_the_death_of_the_server_ends_the_wait_of_a_worker(transport: Transport) -> None:
    with server_process(transport, SMALL) as (process, address, registered):
        (worker,) = started(transport, address, [0], RecordingService(SMALL).push_format.size)
        try:
            worker.connect()
            worker.register()
            wait_until(registered, "the call")
            began = time.monotonic()
            process.kill()
            with pytest.raises(ServerLost):
                worker.result()
            assert time.monotonic() - began < 5.0  # 0.03 s on a machine that does nothing else
        finally:
            worker.close()


def pushed_by(worker: Worker, payload: torch.Tensor) -> Reply:
    """The reply to a push of a worker that begins to connect."""
    worker.connect()
    worker.push(numbers_of(Push, random.Random(1)), payload)
    return worker.result()


def test_a_worker_whose_pushes_have_another_size_is_refused_and_the_others_are_served(transport: Transport) -> None:
    with connected(transport, lambda _: RecordingService(SMALL)) as (service, (worker,), _):
        size, address = service.push_format.size, worker.address
        for other in (size + 64, size - 4):
            (wrong,) = started(transport, address, [1], other)
            try:
                with pytest.raises((Refused, PushRefused), match=rf"\bexpected {size}\b") as caught:
                    pushed_by(wrong, torch.zeros(other, dtype=torch.uint8))
                assert "\n" not in str(caught.value)
            finally:
                wrong.close()
        service.replies = [STOP]
        worker.register()
        assert worker.result().ticket is None
