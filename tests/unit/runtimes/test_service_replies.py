"""Replies of the service: to repeated pushes, to changes from outside, at the end of a run and after a failure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ormo_rpc.messages import Reply
from ormo_rpc.server.parameter_server import ParameterServer
from tests.support.service import ServerResponse, begun, owner


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
