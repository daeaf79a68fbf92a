"""The service without a network: called directly and from many threads, with more workers than an agent has threads."""

from __future__ import annotations

import math
import random
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from ormo_rpc import build_server
from ormo_rpc.errors import BY_NAME, PushRefused, StaleSession, WorkerBanned
from ormo_rpc.messages import ErrorReply, Push, Reply
from ormo_rpc.rendezvous.memberships import Membership
from ormo_rpc.rendezvous.protocol import JoinRequest
from ormo_rpc.runtimes.distributed.server_process import service as service_module
from ormo_rpc.runtimes.distributed.server_process.service import Service
from ormo_rpc.server.buffers import RunningBuffers
from ormo_rpc.server.events import Event, Kind
from ormo_rpc.server.parameter_server import ParameterServer
from ormo_rpc.server.validation import ValidatedPush
from ormo_rpc.transports import pending_replies as answers_module
from tests.support.processes import PATIENCE_SECONDS

DIMENSION = 4
MANY = 24  # an RPC agent has 16 threads by default


class ServerResponse:
    """A future as the worker sees it: an error reply is raised."""

    def __init__(self, future: Any) -> None:
        self.future = future

    def done(self) -> bool:
        """Tell whether it is completed."""
        return self.future.done()

    def value(self) -> Reply:
        """The reply that it is completed with; an error where it is not completed."""
        return self._received(self.future.value())

    def wait(self) -> Reply:
        """Wait for its value."""
        return self._received(self.future.wait())

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Call back when it is completed, in the thread that does so."""
        self.future.add_done_callback(callback)

    @staticmethod
    def _received(result: Any) -> Reply:
        if isinstance(result, ErrorReply):
            raise BY_NAME[result.error](result.text)
        return result


class Owner:
    """The service, as the listener and the transports call it."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.memberships: dict[int, Membership] = {}

    def join(self, worker: int | None, slot: str = "") -> Membership:
        """Let a process join."""
        request = JoinRequest(preferred_worker=worker, pid=1000 + (worker or 0), host="here", slot_id=slot)
        membership = self.service.join(request)
        self.memberships[membership.worker] = membership
        return membership

    def register(self, worker: int) -> ServerResponse:
        """Let a worker join, and register it."""
        return self.register_session(self.join(worker).session_id)

    def register_session(self, session_id: str) -> ServerResponse:
        """Register the worker of a session."""
        return ServerResponse(self.service.register(session_id))

    def push(self, reply: Reply, payload: Tensor | None = None, *, session_id: str | None = None) -> ServerResponse:
        """Push for a reply."""
        assert reply.ticket is not None
        form = self.service.push_format
        payload = gradient(reply.ticket) if payload is None else payload
        grad, buffers = form.unpack(payload.view(torch.uint8))
        push = Push(
            worker=reply.worker,
            ticket=reply.ticket,
            stamp=reply.stamp,
            grad=grad,
            loss=0.5,
            samples=8,
            buffers=buffers,
            incarnation=reply.incarnation,
        )
        answer = self.service.push(session_id or self.memberships[reply.worker].session_id, push)
        return ServerResponse(answer)


def gradient(ticket: int) -> Tensor:
    """A gradient of integers, so that float64 adds them exactly and in any order."""
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
    return [answer.value() for answer in [there.register(worker) for worker in range(there.service.server.num_workers)]]


# -- who is answered when ----------------------------------------------------------------------------------------------


def test_the_first_replies_come_when_all_workers_have_registered() -> None:
    there = owner(MANY)
    answers = [there.register(worker) for worker in range(MANY - 1)]
    assert not any(answer.done() for answer in answers)
    assert not there.service.barrier.passed.is_set()
    answers.append(there.register(MANY - 1))
    assert [(answer.value().worker, answer.value().ticket) for answer in answers] == [(w, w) for w in range(MANY)]
    assert there.service.barrier.passed.is_set()
    present = there.service.memberships.by_worker
    assert {worker: membership.pid for worker, membership in present.items()} == {
        worker: 1000 + worker for worker in range(MANY)
    }


def test_the_order_of_arrival_decides_nothing() -> None:
    """The trace does not have the order of arrival, and a replay has to issue the same tickets."""
    there = owner(3)
    answers = [there.register(worker) for worker in (2, 0, 1)]
    assert [(answer.value().worker, answer.value().ticket) for answer in answers] == [(2, 2), (0, 0), (1, 1)]


def test_a_repeated_register_replaces_the_former_and_gets_the_same_reply() -> None:
    there = owner(2)
    former = there.register(0)
    session_id = there.memberships[0].session_id
    newer = there.register_session(session_id)
    with pytest.raises(TimeoutError, match=r"\Aworker 0 has asked again\Z"):
        former.wait()
    there.register(1)
    reply = newer.value()
    assert reply.ticket == 0
    assert there.register_session(session_id).value() is reply
    assert there.service.server.assignments.issued == 2


# -- coming and going --------------------------------------------------------------------------------------------------


def test_an_elastic_worker_joins_a_run_and_gets_a_ticket_at_once() -> None:
    there = owner(2)
    begun(there)
    membership = there.join(None)
    assert membership.worker == 2  # below are the numbers of the run's own workers
    answer = there.register_session(membership.session_id).value()
    assert (answer.worker, answer.ticket) == (2, 2)
    assert there.service.server.concurrency == 3


def test_a_worker_number_in_use_is_not_given_twice() -> None:
    there = owner(2)
    begun(there)
    assert there.join(1, slot="another").worker == 2
    assert there.service.memberships.by_worker[1].pid == 1001


def test_a_replacement_takes_the_number_of_the_process_that_it_replaces() -> None:
    there = owner(2)
    first, second = there.join(0, slot="a"), there.join(1, slot="b")
    for membership in (first, second):
        there.service.register(membership.session_id)
    replacement = there.join(1, slot="b")
    assert (replacement.worker, replacement.session_id == second.session_id) == (1, False)
    assert sorted(there.service.server.members) == [0]
    assert [(eviction["worker"], eviction["held"], eviction["reason"]) for eviction in there.service.evictions] == [
        (1, [{"ticket": 1, "stamp": 0}], "it was replaced")
    ]
    answer = there.register_session(replacement.session_id).value()
    assert (answer.worker, answer.ticket) == (1, 1)  # the ticket that was lost
    with pytest.raises(StaleSession, match=r"\Athis session is not valid: .*; rejoin\Z"):
        there.push(answer, session_id=second.session_id)  # what the former process still sends


@pytest.mark.parametrize("scheduler", ["async", "sync"])
def test_an_evicted_worker_is_recorded_and_its_ticket_reissued(scheduler: str, caplog: pytest.LogCaptureFixture) -> None:
    there = owner(3, scheduler=scheduler, total_tickets=6)
    first, second, third = begun(there)
    held = [there.push(first), there.push(second)]
    there.service.evict(there.memberships[2], "its connection was closed")
    assert [record.getMessage() for record in caplog.records] == [
        "worker 2 (pid 1002 on here) was evicted: its connection was closed; ticket 2 of stamp 0 will be reissued"
    ]
    assert there.service.changed.is_set()
    replies = [answer.value() for answer in held]
    if scheduler == "async":
        replies = [there.push(replies[0]).value(), replies[1]]
    tickets = [reply.ticket for reply in replies]
    assert 2 in tickets
    with pytest.raises(StaleSession):
        there.push(third)
    there.service.evict(there.memberships[2], "a second time")  # which is no news
    assert len(there.service.evictions) == 1


def test_a_worker_that_waits_for_work_leaves_at_once() -> None:
    there = owner(2, scheduler="sync")
    first, second = begun(there)
    held = there.push(first)
    there.service.request_leave(there.memberships[0])
    assert held.value().ticket is None
    assert there.push(second).value().worker == 1  # alone in its round now
    assert there.service.evictions == []


def test_a_worker_that_computes_leaves_with_its_push_which_counts() -> None:
    there = owner(2, total_tickets=4)
    first, second = begun(there)
    there.service.request_leave(there.memberships[0])
    assert 0 in there.service.server.members
    assert there.push(first).value().ticket is None
    assert sorted(there.service.server.members) == [1]
    assert torch.equal(there.service.server.params, -gradient(0))
    tickets: list[int | None] = []
    reply = second
    while reply.ticket is not None:
        tickets.append(reply.ticket)
        reply = there.push(reply).value()
    assert tickets == [1, 2, 3]
    assert there.service.evictions == []


def test_the_start_need_not_wait_for_all() -> None:
    there = owner(3)
    answer = there.register(1)
    assert not answer.done()
    there.service.start()
    assert (answer.value().worker, answer.value().ticket) == (1, 0)
    assert sorted(there.service.server.members) == [1]
    assert there.register(0).value().ticket == 1
    assert there.service.server.concurrency == 2


def test_a_worker_whose_gradients_are_never_finite_is_banned(caplog: pytest.LogCaptureFixture) -> None:
    there = owner(2, total_tickets=9)
    there.service.max_not_finite = 3
    bad, good = begun(there)
    nan = torch.full((DIMENSION,), math.nan, dtype=torch.float64)
    for _ in range(2):
        bad = there.push(bad, nan).value()
        good = there.push(good).value()
    answer = there.push(bad, nan)
    with pytest.raises(WorkerBanned, match=r"\Aworker 0: 3 gradients in a row were not finite \(runtime\.max_not_finite\)\Z"):
        answer.wait()
    assert "worker 0 (pid 1000 on here) was banned: 3 gradients in a row" in caplog.text
    assert sorted(there.service.server.members) == [1]
    while good.ticket is not None:
        good = there.push(good).value()
    assert torch.equal(there.service.server.params, -total(9))  # its tickets were done by the other one


def test_a_finite_gradient_resets_the_count_of_non_finite_ones() -> None:
    there = owner(2)
    there.service.max_not_finite = 2
    reply, _ = begun(there)
    nan = torch.full((DIMENSION,), math.nan, dtype=torch.float64)
    for payload in (nan, None, nan, None):
        reply = there.push(reply, payload).value()
    assert sorted(there.service.server.members) == [0, 1]


def test_a_process_that_joins_after_the_end_is_refused() -> None:
    there = owner(1, total_tickets=1)
    (reply,) = begun(there)
    there.push(reply)
    with pytest.raises(ValueError, match=r"\Athe run has ended\Z"):
        there.join(5)


# -- barriers ----------------------------------------------------------------------------------------------------------


def test_a_barrier_of_many_workers_blocks_no_thread() -> None:
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
        self.chance = random.Random(number)
        self.done: list[int] = []
        self.repeated = 0
        self.failure: BaseException | None = None

    def run(self) -> None:
        """Work to the end, and keep an error for the test."""
        try:
            self.work(self.there.register(self.number).wait())
        except BaseException as error:
            self.failure = error

    def work(self, reply: Reply) -> None:
        """From reply to push, to the end of the run."""
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


def failed(answer: ServerResponse) -> bool:
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
    answers: list[ServerResponse] = []

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
    with pytest.raises(PushRefused) as caught:
        there.push(reply, torch.zeros(length, dtype=torch.float64))
    expected = rf"push: payload: got \({8 * length},\) of torch.uint8 on cpu, expected {8 * (DIMENSION + buffers)} bytes .*"
    assert re.fullmatch(expected, str(caught.value))
    assert there.service.server.iteration == 0
    statistics = torch.arange(float(buffers), dtype=torch.float64)
    assert there.push(reply, torch.cat([gradient(0), statistics])).value().ticket == 2
    assert [value.tolist() for value in there.service.server.buffers.average.values()] == ([[0, 1, 2]] if buffers else [])


def test_a_refused_push_does_not_complete_the_open_future() -> None:
    seen: list[int] = []
    there = owner(2, scheduler="sync", observe=lambda server: seen.append(server.iteration))
    first, second = begun(there)
    held = there.push(first)
    with pytest.raises(
        PushRefused, match=r"\Apush of worker 0: ticket: got 1, which is held by worker 1; push for a ticket .*"
    ):
        there.push(Reply(worker=0, ticket=1, stamp=0, params=first.params, lr=0.0, steps=1, incarnation=0))
    with pytest.raises(StaleSession, match=r"\Apush of worker 0 for ticket 0: incarnation: got 9, expected 0; .*"):
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
    there.service.change(change)
    if change is ParameterServer.stop:
        assert held.value().ticket is None
        assert there.push(second).value().ticket is None
    else:
        assert not held.done()  # the other's gradient is still wanted
        answer = there.push(second)
        assert (held.value().ticket, answer.value().ticket) == (None, None)
    assert there.service.server.iteration == (1 if change is ParameterServer.stop else 2)


def test_replies_that_end_workers_are_held_back_until_the_last_checkpoint() -> None:
    there = owner(2, total_tickets=2)
    there.service.pending.defer_shutdown = True
    first, second = begun(there)
    answers = [there.push(first), there.push(second)]
    assert there.service.server.ended
    again = there.push(second)  # after a time-out, say
    assert not any(answer.done() for answer in (answers[0], again))
    there.service.release_shutdown()
    assert [answer.value().ticket for answer in (answers[0], again)] == [None, None]


def test_the_start_does_not_wait_for_a_worker_that_has_ended() -> None:
    there = owner(3)
    answers = [there.register(0), there.register(2)]
    assert not there.service.barrier.passed.is_set()
    there.service.stop_expecting(1)
    assert [answer.value().ticket for answer in answers] == [0, 1]


def test_an_elastic_worker_that_registers_early_joins_at_the_start() -> None:
    events: list[Event] = []
    there = owner(2, record=events.append)
    elastic = there.register_session(there.join(None).session_id)
    answers = [there.register(1), there.register(0)]
    assert [(answer.value().worker, answer.value().ticket) for answer in (answers[1], answers[0], elastic)] == [
        (0, 0),
        (1, 1),
        (2, 2),
    ]
    assert [event.kind for event in events] == [Kind.issue, Kind.issue, Kind.join, Kind.issue]  # which a replay does again


def test_on_start_is_called_before_the_first_ticket_is_issued() -> None:
    there = owner(2)
    service = there.service
    calls: list[tuple[bool, int]] = []
    service.on_start = lambda: calls.append((service.lock.locked(), len(service.server.assignments.holding)))
    there.register(1)
    assert calls == []
    there.register(0)
    assert calls == [(True, 0)]
    assert len(service.server.assignments.holding) == 2


@pytest.mark.parametrize("where", ["server", "observer"])
def test_a_failure_while_a_push_is_applied_is_kept_and_no_reply_is_sent(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = OSError("the disk is full")

    def fail(*_arguments: Any) -> list[Reply]:
        raise failure

    there = owner(3, scheduler="sync")
    service = there.service
    first, second, third = begun(there)
    held = there.push(first)
    assert service.failure is None
    monkeypatch.setattr(*((service.server, "commit") if where == "server" else (service, "observe")), fail)
    failed_push = there.push(second)
    assert service.failure is failure
    monkeypatch.undo()
    iteration = service.server.iteration
    answers = [held, failed_push, there.push(third), there.push(second)]
    assert not any(answer.done() for answer in answers)
    assert service.server.iteration == iteration  # a state that is not to be trusted is not changed any more
    assert service.failure is failure


def test_a_failure_of_the_first_replies_is_kept_and_ends_the_wait_for_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    failure = RuntimeError("the scheduler releases nobody")

    def fail(*_arguments: Any) -> list[Reply]:
        raise failure

    there = owner(2)
    monkeypatch.setattr(there.service.server, "start", fail)
    answers = [there.register(worker) for worker in range(2)]
    assert there.service.failure is failure
    assert there.service.barrier.passed.is_set()
    assert not any(answer.done() for answer in answers)


def test_a_refused_push_is_no_failure_of_the_service() -> None:
    there = owner(2)
    first, _ = begun(there)
    with pytest.raises(PushRefused):
        there.push(first, torch.zeros(DIMENSION + 1, dtype=torch.float64))
    with pytest.raises(PushRefused):
        there.push(Reply(worker=0, ticket=1, stamp=0, params=first.params, lr=0.0, steps=1, incarnation=0))
    assert there.service.failure is None
    assert there.push(first).value().ticket == 2


def test_a_worker_that_holds_a_ticket_beyond_the_time_out_is_evicted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(answers_module, "time", clock)
    there = owner(3, scheduler="partial", k=2)
    service = there.service
    first, second, _ = begun(there)
    clock.now = 10.0
    there.push(first)
    service.evict_late(10.0)
    assert service.evictions == []
    there.push(second)  # makes two: both go on, with new tickets
    service.evict_late(9.0)
    assert [(eviction["worker"], eviction["reason"]) for eviction in service.evictions] == [
        (2, "no push for runtime.ticket_timeout_seconds=9, stuck or too slow for it")
    ]
    assert sorted(service.server.members) == [0, 1]


def test_a_worker_that_leaves_at_the_end_is_not_an_eviction() -> None:
    there = owner(2)
    begun(there)
    there.service.change(ParameterServer.stop)
    there.service.leave(there.memberships[1].session_id)
    there.service.evict(there.memberships[1], "its connection was closed")
    assert sorted(there.service.memberships.by_worker) == [0]
    assert there.service.evictions == []


def test_a_worker_that_leaves_before_the_end_is_evicted_and_its_ticket_reissued() -> None:
    there = owner(2)
    begun(there)
    there.service.leave(there.memberships[1].session_id)
    assert [eviction["held"] for eviction in there.service.evictions] == [[{"ticket": 1, "stamp": 0}]]
    assert list(there.service.server.assignments.returned) == [1]


class Clock:
    """A substitute for the module `time`."""

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


def test_lock_times_are_measured_separately_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    lock = SlowLock(clock)
    held: list[bool] = []

    def observe(_server: ParameterServer) -> None:
        held.append(lock.held)
        clock.now += 5

    there = owner(1, observe=observe)
    reply = begun(there)[0]
    monkeypatch.setattr(service_module, "time", clock)
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
    check = service.server.validate

    def look(push: Push) -> ValidatedPush:
        locked.append(("validate", service.lock.locked()))
        return check(push)

    monkeypatch.setattr(service.server, "validate", look)
    settle = service._complete  # pyright: ignore[reportPrivateUsage] # there is no other place to look from

    def send(due: Any) -> None:
        locked.append(("send", service.lock.locked()))
        settle(due)

    monkeypatch.setattr(service, "_complete", send)
    there.push(reply)
    assert locked == [("validate", False), ("send", False)]
