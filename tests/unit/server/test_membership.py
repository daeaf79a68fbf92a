"""Workers that join and leave: their tickets, late pushes and barriers."""

from __future__ import annotations

import pytest
import torch

from ormo_rpc.errors import StaleSession
from ormo_rpc.server.events import Kind
from ormo_rpc.server.parameter_server import Status
from tests.support.contract import same
from tests.support.schedule import answer
from tests.support.trial import ONE, begin, brief


def test_the_ticket_of_a_worker_that_left_is_reissued_with_the_present_parameters() -> None:
    trial = begin()
    trial.push(0)
    assert trial.note(trial.server.leave(1)) == [], "the others are at work"
    (reply,) = trial.push(2)
    assert brief([reply]) == [(2, 1, 2)]
    assert torch.equal(reply.params, trial.server.params)
    assert brief(trial.push(0)) == [(0, 4, 3)], "then new tickets again"
    assert [event.data for event in trial.events if event.kind is Kind.leave] == [
        {"worker": 1, "concurrency": 2, "tickets": [1]}
    ]


def test_an_idle_worker_gets_the_ticket_of_one_that_left_at_once() -> None:
    trial = begin(num_workers=2, tickets=2)
    assert trial.push(0) == []
    assert brief(trial.note(trial.server.leave(1))) == [(0, 1, 1)]


def test_a_late_push_of_a_worker_that_left_is_refused_and_after_its_return_gets_its_new_ticket() -> None:
    trial = begin()
    late = trial.work(1, 100 * ONE)
    trial.push(0)
    trial.server.leave(1)
    before = trial.server.state_dict()
    with pytest.raises(
        StaleSession, match=r"^push of worker 1 for ticket 1: it is not a member, members are \[0, 2\]; join \(again\) "
    ):
        trial.server.receive(late)
    assert same(trial.server.state_dict(), before)
    (new,) = trial.note(trial.server.join(1))
    assert brief([new]) == [(1, 1, 1)]
    before = trial.server.state_dict()
    assert trial.server.receive(late)[0] is new
    assert same(trial.server.state_dict(), before)
    assert brief(trial.push(1)) == [(1, 4, 2)]


def test_a_late_push_of_a_worker_that_rejoined_counts_for_the_same_ticket_and_stamp() -> None:
    # Nobody pushed in between: same ticket, same parameters, so the same gradient; the first to come is taken, the other not.
    trial = begin()
    late = trial.work(1)
    trial.server.leave(1)
    (new,) = trial.note(trial.server.join(1))
    assert (new.ticket, new.stamp) == (late.ticket, late.stamp) == (1, 0)
    (reply,) = trial.server.receive(late)
    assert trial.server.receive(answer(new, ONE))[0] is reply
    assert trial.server.iteration == 1


def test_a_barrier_does_not_wait_for_a_worker_that_left() -> None:
    trial = begin(scheduler="sync")
    assert (trial.push(0), trial.push(2)) == ([], [])
    # Its ticket 1 goes to the first in the queue, the others get new ones.
    assert brief(trial.note(trial.server.leave(1))) == [(0, 1, 2), (2, 3, 2)]


def test_a_worker_that_leaves_while_blocked_gets_no_reply_and_its_gradient_stays() -> None:
    trial = begin(scheduler="sync")
    trial.push(1)
    assert trial.server.leave(1) == []
    trial.push(0)
    assert brief(trial.push(2)) == [(0, 3, 3), (2, 4, 3)]


def test_a_worker_that_joins_waits_for_the_next_round_and_counts_from_then_on() -> None:
    trial = begin(scheduler="sync", num_workers=2)
    trial.push(0)
    assert trial.server.join(7) == []
    assert brief(trial.push(1)) == [(0, 2, 2), (7, 3, 2), (1, 4, 2)]
    assert (trial.push(0), trial.push(1)) == ([], [])
    assert brief(trial.push(7)) == [(0, 5, 5), (1, 6, 5), (7, 7, 5)]


def test_after_all_have_left_a_new_worker_finishes_the_run() -> None:
    trial = begin(num_workers=2, tickets=3)
    assert (trial.server.leave(0), trial.server.leave(1)) == ([], [])
    assert brief(trial.note(trial.server.join(5))) == [(5, 0, 0)]
    assert brief(trial.push(5)) == [(5, 1, 1)]
    assert brief(trial.push(5)) == [(5, 2, 2)]
    assert brief(trial.push(5)) == [(5, None, 3)]
    assert trial.server.status is Status.completed


def test_a_worker_that_joins_after_the_end_is_stopped() -> None:
    trial = begin(num_workers=1, tickets=1)
    trial.push(0)
    assert brief(trial.server.join(3)) == [(3, None, 1)]


def test_invalid_joins_and_leaves_are_refused() -> None:
    server = begin().server
    before = server.state_dict()
    text = r"^join of worker 1: it is a member already; let it leave first, or use another number$"
    with pytest.raises(ValueError, match=text):
        server.join(1)
    with pytest.raises(ValueError, match=r"^join: got worker -1, expected a number >= 0$"):
        server.join(-1)
    with pytest.raises(ValueError, match=r"^leave of worker 7: it is not a member; members are \[0, 1, 2\]$"):
        server.leave(7)
    assert same(server.state_dict(), before)
