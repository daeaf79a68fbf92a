"""Workers that join, leave, are replaced and are evicted while the service runs."""

from __future__ import annotations

import pytest
import torch

from ormo_rpc.errors import StaleSession
from ormo_rpc.server.parameter_server import ParameterServer
from ormo_rpc.transports import pending_replies as answers_module
from tests.support.service import Clock, begun, gradient, owner


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


def test_a_process_that_joins_after_the_end_is_refused() -> None:
    there = owner(1, total_tickets=1)
    (reply,) = begun(there)
    there.push(reply)
    with pytest.raises(ValueError, match=r"\Athe run has ended\Z"):
        there.join(5)


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
