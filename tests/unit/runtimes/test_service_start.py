"""The start of a run in the service: whom it waits for, and the first replies."""

from __future__ import annotations

from typing import Any

import pytest

from ormo_rpc.messages import Reply
from ormo_rpc.server.events import Event, Kind
from tests.support.service import MANY, owner


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


def test_the_start_need_not_wait_for_all() -> None:
    there = owner(3)
    answer = there.register(1)
    assert not answer.done()
    there.service.start()
    assert (answer.value().worker, answer.value().ticket) == (1, 0)
    assert sorted(there.service.server.members) == [1]
    assert there.register(0).value().ticket == 1
    assert there.service.server.concurrency == 2


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
