"""The service called from many threads, with more workers than an RPC agent has threads; and its lock."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from ormo_rpc.messages import Push, Reply
from ormo_rpc.runtimes.distributed.server_process import service as service_module
from ormo_rpc.server.events import Event, Kind
from ormo_rpc.server.parameter_server import ParameterServer
from ormo_rpc.server.validation import ValidatedPush
from tests.support.processes import PATIENCE_SECONDS
from tests.support.service import DIMENSION, MANY, Clock, Owner, ServerResponse, begun, gradient, owner, total


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
