"""The service without a network: handlers called directly and from many threads, at more workers than an agent has threads."""

from __future__ import annotations

import math
import random
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, cast

import pytest
import torch
import torch.distributed.rpc as rpc
from torch import Tensor

from ormo_rpc import build_server
from ormo_rpc.buffers import RunningBuffers
from ormo_rpc.errors import PushRefused, Rejoin
from ormo_rpc.messages import Push, Reply
from ormo_rpc.records import Event, Kind
from ormo_rpc.runtimes.rpc import service as module
from ormo_rpc.runtimes.rpc.service import Service, deliver, say_goodbye
from ormo_rpc.server import ParameterServer
from tests.processes import PATIENCE_SECONDS

DIMENSION = 4
MANY = 24  # an RPC agent has 16 threads by default


class Answer(Protocol):
    """A Future of torch, whose own annotations lack what it is completed with."""

    def done(self) -> bool:
        """Whether it is completed."""
        ...

    def value(self) -> Reply:
        """What it is completed with; an error where it is not."""
        ...

    def wait(self) -> Reply:
        """Wait for its value."""
        ...

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Call back when it is completed, in the thread that does so."""
        ...


class Owner:
    """What a handler sees of the RRef: in the process that owns the service, the service itself."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def local_value(self) -> Service:
        """The service."""
        return self.service

    def hello(self, worker: int) -> Answer:
        """Call the handler of a worker's first word."""
        return cast("Answer", Service.hello(cast("rpc.RRef[Service]", self), worker, 1000 + worker))

    def push(self, reply: Reply, payload: Tensor | None = None) -> Answer:
        """Call the handler of a push that answers a reply."""
        assert reply.ticket is not None
        answer = Service.push(
            cast("rpc.RRef[Service]", self),
            reply.worker,
            reply.ticket,
            reply.stamp,
            reply.incarnation,
            0.5,
            8,
            gradient(reply.ticket) if payload is None else payload,
        )
        return cast("Answer", answer)


def gradient(ticket: int) -> Tensor:
    """Whole numbers, so that float64 adds them exactly and in any order."""
    return torch.tensor([1.0, ticket, -ticket, ticket % 7], dtype=torch.float64)


def total(count: int) -> Tensor:
    return torch.stack([gradient(ticket) for ticket in range(count)]).sum(0)


def owner(
    num_workers: int, *, observe: Callable[[ParameterServer], None] = lambda _: None, buffers: int = 0, **options: Any
) -> Owner:
    given: dict[str, Any] = {"algorithm": "asgd", "lr": 1.0, "params": torch.zeros(DIMENSION, dtype=torch.float64), **options}
    if buffers:
        given["buffers"] = RunningBuffers({"mean": torch.zeros(buffers, dtype=torch.float64)}, {"mean": 1.0})
    return Owner(Service(build_server(num_workers=num_workers, **given), observe))


def begun(there: Owner) -> list[Reply]:
    """The first replies, one per worker."""
    return [answer.value() for answer in [there.hello(worker) for worker in range(there.service.server.num_workers)]]


# -- who is answered when ----------------------------------------------------------------------------------------------


def test_the_first_replies_come_when_all_have_said_hello() -> None:
    there = owner(MANY)
    answers = [there.hello(worker) for worker in range(MANY - 1)]
    assert not any(answer.done() for answer in answers)
    assert not there.service.started.is_set()
    answers.append(there.hello(MANY - 1))
    assert [(answer.value().worker, answer.value().ticket) for answer in answers] == [(w, w) for w in range(MANY)]
    assert there.service.started.is_set()
    assert there.service.processes == {worker: 1000 + worker for worker in range(MANY)}


@pytest.mark.parametrize("worker", [0, -1, 2])
def test_hello_refuses_the_unknown_and_the_repeated(worker: int) -> None:
    there = owner(2)
    answer = there.hello(0)
    with pytest.raises(PushRefused) as caught:
        there.hello(worker)
    assert str(caught.value) == f"hello: got worker {worker}, expected one below 2 that is new here"
    there.hello(1)
    assert answer.value().ticket == 0


def test_a_barrier_of_many_workers_blocks_nobody() -> None:
    """One thread calls all handlers: were one of them to wait, this would stand still. The result is SSGDm's."""
    rounds, beta = 6, 0.5
    there = owner(MANY, algorithm="ormo", scheduler="sync", momentum=beta, total_tickets=rounds * MANY)
    replies = begun(there)
    w, momentum = torch.zeros(DIMENSION, dtype=torch.float64), torch.zeros(DIMENSION, dtype=torch.float64)
    for number in range(rounds):
        tickets = [reply.ticket for reply in replies]
        assert tickets == list(range(number * MANY, (number + 1) * MANY))
        assert all(torch.equal(reply.params, w) for reply in replies)
        answers = [there.push(reply) for reply in replies[:-1]]
        assert not any(answer.done() for answer in answers)
        answers.append(there.push(replies[-1]))
        replies = [answer.value() for answer in answers]
        # Heavy ball on the sum of the round: v <- beta v + sum g; w <- w - v. All are small whole numbers and halves: exact.
        momentum = beta * momentum + torch.stack([gradient(ticket) for ticket in tickets if ticket is not None]).sum(0)
        w = w - momentum
    assert all(reply.ticket is None for reply in replies)
    assert torch.equal(there.service.server.params, w)


class Client(threading.Thread):
    """A worker that now and then delivers a push again, from another thread and before the first one is answered."""

    def __init__(self, there: Owner, number: int, repeats: float) -> None:
        super().__init__(daemon=True)
        self.there = there
        self.number = number
        self.repeats = repeats
        self.chance = random.Random(number)  # noqa: S311 - reproducible on purpose
        self.done: list[int] = []
        self.repeated = 0
        self.failure: BaseException | None = None

    def run(self) -> None:
        """Work to the end, and keep what goes wrong for the test to see."""
        try:
            self.work(self.there.hello(self.number).wait())
        except BaseException as error:
            self.failure = error

    def work(self, reply: Reply) -> None:
        """From reply to push until told to stop."""
        while reply.ticket is not None:
            assert reply.worker == self.number
            before = reply.params.clone()
            self.done.append(reply.ticket)
            answer = self.there.push(reply)
            if self.chance.random() < self.repeats:
                self.repeated += 1
                first = answer
                with ThreadPoolExecutor(1) as elsewhere:
                    answer = elsewhere.submit(self.there.push, reply).result()
                following = answer.wait()
                if not failed(first):  # then it was answered before the second call came, and with the same
                    assert first.wait().ticket == following.ticket
            assert torch.equal(reply.params, before)
            reply = answer.wait()


def failed(answer: Answer) -> bool:
    try:
        answer.wait()
    except TimeoutError:
        return True
    return False


@pytest.mark.parametrize("scheduler", ["async", "sync"])
@pytest.mark.parametrize("repeats", [0.0, 0.3])
def test_many_threads_apply_every_ticket_once(scheduler: str, repeats: float) -> None:
    tickets = 20 * MANY
    seen: list[int] = []
    events: list[Event] = []
    there = owner(
        MANY,
        scheduler=scheduler,
        total_tickets=tickets,
        observe=lambda server: seen.append(server.iteration),
        record=events.append,
    )
    clients = [Client(there, number, repeats) for number in range(MANY)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(PATIENCE_SECONDS)
        assert not client.is_alive(), f"worker {client.number} waits for an answer"
        assert client.failure is None
    # Nobody was handed a ticket twice, although pushes were repeated; together they had all of them.
    assert sorted(ticket for client in clients for ticket in client.done) == list(range(tickets))
    applied = [event.data for event in events if event.kind is Kind.apply]
    assert [data["iteration"] for data in applied] == list(range(tickets))
    assert torch.equal(there.service.server.params, -total(tickets))
    repeated = sum(client.repeated for client in clients)
    assert (repeated > 50) == (repeats > 0)
    # One look after each push, under the lock, hence in order.
    assert seen == sorted(seen)
    assert len(seen) == tickets + repeated


# -- repeated pushes ---------------------------------------------------------------------------------------------------


def test_a_repeated_push_takes_the_place_of_the_former_call() -> None:
    there = owner(2, scheduler="sync")
    first, second = begun(there)
    former = there.push(first)
    newer = there.push(first)
    with pytest.raises(TimeoutError, match=r"\Aworker 0 has asked again\Z"):
        former.wait()
    assert not newer.done()
    other = there.push(second)
    assert (newer.value().ticket, other.value().ticket) == (2, 3)
    assert there.service.server.iteration == 2


def test_a_repeated_push_gets_the_identical_reply() -> None:
    there = owner(2)
    first, _ = begun(there)
    answer = there.push(first).value()
    again = there.push(first).value()
    assert again is answer
    assert there.service.server.iteration == 1


def test_a_reply_that_is_late_to_be_sent_does_not_answer_the_next_push() -> None:
    """Worker 0's push ends the barrier; before its reply is sent it repeats the push, gets that reply, and pushes the next."""
    there = owner(2, scheduler="sync")
    first, second = begun(there)
    answers: list[Answer] = []

    def meanwhile(_future: Any) -> None:
        repeated = there.push(first)
        answers.extend([repeated, there.push(repeated.value())])

    held = there.push(second)
    held.add_done_callback(meanwhile)  # runs between the sending of the two replies that become due at once
    late = there.push(first)
    repeated, following = answers
    assert late.value() is repeated.value()
    assert not following.done()  # at the barrier, where worker 1 is not yet
    there.push(held.value())
    assert following.value().ticket == 4


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_goes_to_another_worker() -> None:
    there = owner(2)
    bad, good = begun(there)
    payload = gradient(0)
    payload[2] = math.nan
    answer = there.push(bad, payload).value()
    assert answer.ticket == 2  # other work
    assert not there.service.server.params.any()
    answer = there.push(good).value()
    assert (answer.worker, answer.ticket) == (1, 0)  # the refused one
    there.push(answer)
    assert torch.equal(there.service.server.params, -(gradient(0) + gradient(1)))


@pytest.mark.parametrize("buffers", [0, 3])
@pytest.mark.parametrize("difference", [-7, -4, -3, -1, 1, 5])
def test_a_payload_of_wrong_length_is_refused_and_nothing_changes(buffers: int, difference: int) -> None:
    there = owner(2, buffers=buffers)
    reply, _ = begun(there)
    length = max(0, DIMENSION + buffers + difference)
    got = max(0, length - buffers)
    with pytest.raises(PushRefused) as caught:
        there.push(reply, torch.zeros(length, dtype=torch.float64))
    expected = (
        rf"push of worker 0 for ticket 0: gradient: got shape \({got},\), expected \(4,\), as the server's parameters have it"
    )
    assert re.fullmatch(expected, str(caught.value))
    assert there.service.server.iteration == 0
    statistics = torch.arange(float(buffers), dtype=torch.float64)
    assert there.push(reply, torch.cat([gradient(0), statistics])).value().ticket == 2
    assert [value.tolist() for value in there.service.server.buffers.average.values()] == ([[0, 1, 2]] if buffers else [])


def test_a_refused_push_leaves_the_open_answer_alone() -> None:
    seen: list[int] = []
    there = owner(2, scheduler="sync", observe=lambda server: seen.append(server.iteration))
    first, second = begun(there)
    held = there.push(first)
    with pytest.raises(
        PushRefused, match=r"\Apush of worker 0: ticket: got 1, which is held by worker 1; push for a ticket .*"
    ):
        there.push(Reply(worker=0, ticket=1, stamp=0, params=first.params, lr=0.0, steps=1, incarnation=0))
    with pytest.raises(Rejoin, match=r"\Apush of worker 0 for ticket 0: incarnation: got 9, expected 0; .*"):
        there.push(Reply(worker=0, ticket=0, stamp=0, params=first.params, lr=0.0, steps=1, incarnation=9))
    assert not held.done()
    there.push(second)
    assert held.value().ticket == 2
    assert seen == [1, 2]  # nothing to see after what was refused


# -- from the server's process -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [ParameterServer.stop, ParameterServer.finish])
def test_a_change_from_outside_sends_the_replies_that_it_makes_due(change: Callable[[ParameterServer], list[Reply]]) -> None:
    there = owner(2, scheduler="sync")
    first, second = begun(there)
    held = there.push(first)
    there.service.call(change)
    if change is ParameterServer.stop:
        assert held.value().ticket is None
        assert there.push(second).value().ticket is None
    else:
        assert not held.done()  # the other's gradient is still wanted
        answer = there.push(second)
        assert (held.value().ticket, answer.value().ticket) == (None, None)
    assert there.service.server.iteration == (1 if change is ParameterServer.stop else 2)


def test_the_start_is_told_before_the_first_ticket_is_handed_out() -> None:
    there = owner(2)
    service = there.service
    told: list[tuple[bool, int]] = []
    service.on_start = lambda: told.append((service.lock.locked(), len(service.server.ledger.holding)))
    there.hello(1)
    assert told == []
    there.hello(0)
    assert told == [(True, 0)]
    assert len(service.server.ledger.holding) == 2


@pytest.mark.parametrize("where", ["server", "observer"])
def test_a_failure_while_a_push_is_applied_is_kept_and_nobody_is_answered(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = OSError("the disk is full")

    def fail(*_arguments: Any) -> list[Reply]:
        raise failure

    there = owner(3, scheduler="sync")
    service = there.service
    first, second, third = begun(there)
    held = there.push(first)
    assert service.broken is None
    monkeypatch.setattr(*((service.server, "redeem") if where == "server" else (service, "observe")), fail)
    failed_push = there.push(second)
    assert service.broken is failure
    monkeypatch.undo()
    iteration = service.server.iteration
    answers = [held, failed_push, there.push(third), there.push(second)]
    assert not any(answer.done() for answer in answers)
    assert service.server.iteration == iteration  # a state that is not to be trusted is not changed any more
    assert service.broken is failure


def test_a_refused_push_breaks_nothing() -> None:
    there = owner(2)
    first, _ = begun(there)
    with pytest.raises(PushRefused):
        there.push(first, torch.zeros(DIMENSION + 1, dtype=torch.float64))
    with pytest.raises(PushRefused):
        there.push(Reply(worker=0, ticket=1, stamp=0, params=first.params, lr=0.0, steps=1, incarnation=0))
    assert there.service.broken is None
    assert there.push(first).value().ticket == 2


def test_who_holds_a_ticket_past_the_patience_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    there = owner(3, scheduler="partial", k=2)
    service = there.service
    first, second, _ = begun(there)
    clock.now = 10.0
    held = there.push(first)
    assert sorted(service.late(9.0)) == [1, 2]  # worker 0 waits at the barrier and holds nothing
    assert service.late(10.0) == []
    there.push(second)  # makes two: both go on, with new tickets
    assert held.done()
    assert service.late(9.0) == [2]
    clock.now = 20.0
    assert service.late(10.0) == [2]
    assert sorted(service.late(9.0)) == [0, 1, 2]


def test_who_said_goodbye_is_gone() -> None:
    there = owner(2)
    begun(there)
    Service.goodbye(cast("rpc.RRef[Service]", there), 1)
    assert there.service.gone == {1}


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        """The time that was set."""
        return self.now

    monotonic = perf_counter


class SlowLock:
    """A lock that always takes three seconds to get."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.held = False

    def __enter__(self) -> None:
        self.clock.now += 3
        self.held = True

    def __exit__(self, *_error: object) -> None:
        self.held = False


def test_lock_times_are_told_apart_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    lock = SlowLock(clock)
    held: list[bool] = []

    def observe(_server: ParameterServer) -> None:
        held.append(lock.held)
        clock.now += 5

    there = owner(1, observe=observe)
    reply = begun(there)[0]
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(there.service, "lock", lock)
    for pushes in (1, 2, 3):
        reply = there.push(reply).value()
        assert (there.service.lock_wait_seconds, there.service.lock_held_seconds) == (3 * pushes, 5 * pushes)
    assert held == [True] * 3


def test_the_payload_is_checked_before_the_lock_is_taken_and_sent_after_it_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    there = owner(1)
    service = there.service
    reply = begun(there)[0]
    locked: list[tuple[str, bool]] = []
    check = service.server.check

    def look(push: Push) -> float:
        locked.append(("check", service.lock.locked()))
        return check(push)

    monkeypatch.setattr(service.server, "check", look)
    settle = module._settle  # pyright: ignore[reportPrivateUsage] # there is no other place to look from

    def send(due: Any) -> None:
        locked.append(("send", service.lock.locked()))
        settle(due)

    monkeypatch.setattr(module, "_settle", send)
    there.push(reply)
    assert locked == [("check", False), ("send", False)]


# -- in a worker -------------------------------------------------------------------------------------------------------


class Wire:
    """Stands in for `rpc.rpc_sync`: each call fails with the next of the texts, or is answered where that is None."""

    def __init__(self, *failures: str | None) -> None:
        self.failures = list(failures)
        self.called: list[str] = []
        self.arguments: list[tuple[Any, ...]] = []

    def __call__(self, _to: str, function: Callable[..., Any], args: tuple[Any, ...] = (), *, timeout: float) -> str:
        """Note the call, then fail or answer."""
        self.called.append(function.__name__)
        self.arguments.append((*args[1:], timeout))
        failure = self.failures.pop(0) if self.failures else None
        if failure is not None:
            raise RuntimeError(failure)
        return "reply"


class Remote:
    """The RRef at a worker."""

    def owner(self) -> str:
        """The name of the server."""
        return "server"


TIMEOUT = "RPCErr:1:RPC ran for more than set timeout (1000 ms) and will now be marked with an error"
EOF = "eof (this error originated at tensorpipe/transport/shm/connection_impl.cc:259)"


def delivered(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(rpc, "rpc_sync", wire)
    payload = gradient(7)
    push = Push(worker=3, ticket=7, stamp=5, grad=payload, loss=0.5, samples=8, incarnation=2)
    return deliver(cast("rpc.RRef[Service]", Remote()), push, payload, timeout_seconds=9.0)


def test_a_push_that_timed_out_is_repeated_unchanged_while_the_server_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(TIMEOUT, None, TIMEOUT, None)
    assert delivered(wire, monkeypatch) == "reply"
    assert wire.called == ["push", "published", "push", "published", "push"]
    pushes = wire.arguments[::2]
    assert all(push[:6] == (3, 7, 5, 2, 0.5, 8) and push[7] == 9.0 for push in pushes)
    assert all(torch.equal(push[6], gradient(7)) for push in pushes)


@pytest.mark.parametrize(
    ("failures", "called"),
    [
        ((TIMEOUT, TIMEOUT), ["push", "published"]),  # a server that hangs
        ((TIMEOUT, EOF), ["push", "published"]),
        ((EOF,), ["push"]),
    ],
)
def test_a_push_is_given_up_when_the_server_is_gone(
    failures: tuple[str, ...], called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = Wire(*failures)
    with pytest.raises(RuntimeError) as caught:
        delivered(wire, monkeypatch)
    assert str(caught.value) == failures[-1]
    assert wire.called == called


def test_a_server_that_has_gone_needs_no_goodbye(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(EOF)
    monkeypatch.setattr(rpc, "rpc_sync", wire)
    say_goodbye(cast("rpc.RRef[Service]", Remote()), 3, 1.0)
    assert (wire.called, wire.arguments) == (["goodbye"], [(3, 1.0)])
