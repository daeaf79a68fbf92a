"""Replies to pushes, to repeated ones too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ormo_rpc.errors import PushRefused
from ormo_rpc.server.parameter_server import Status
from tests.support.contract import same
from tests.support.trial import begin, brief


def test_the_parameters_of_a_reply_are_those_of_its_stamp() -> None:
    # lr(t) = t + 1. Ticket 3 is issued at iteration 1; the parameters are 0 - 1 * 1 = -1.
    trial = begin(algorithm="asgd", lr=lambda t: t + 1.0)
    assert [(r.lr, r.steps, r.incarnation) for r in trial.held.values()] == [(1.0, 1, 0)] * 3
    (reply,) = trial.push(2)
    assert (reply.worker, reply.ticket, reply.stamp, reply.lr) == (2, 3, 1, 2.0)
    assert reply.params.tolist() == [-1.0, -1.0, -1.0]


def test_the_lr_schedule_is_called_for_iterations_of_the_run_only() -> None:
    table = [0.5, 0.25, 0.125]
    trial = begin(num_workers=2, tickets=3, lr=lambda t: table[t], algorithm="asgd")
    trial.push(0)
    trial.push(0)
    assert brief(trial.push(1)) == [(0, None, 3), (1, None, 3)]
    assert trial.server.params.tolist() == [-0.875] * 3  # 0.5 + 0.25 + 0.125


def test_a_run_that_ends_before_its_first_ticket_asks_for_the_first_iterations_learning_rate() -> None:
    asked: list[int] = []

    def lr(t: int) -> float:
        asked.append(t)
        return 0.5

    trial = begin(min_workers=4, lr=lr)  # three workers: no ticket is issued
    trial.server.finish()
    assert trial.server.status is Status.completed
    assert set(asked) == {0}


def test_the_initial_parameters_are_copied() -> None:
    start = torch.zeros(3, dtype=torch.float64)
    begin(params=start).push(0)
    assert start.tolist() == [0, 0, 0]


@pytest.mark.parametrize("scheduler", ["async", "sync"])
def test_a_run_without_total_tickets_continues(scheduler: str) -> None:
    trial = begin(tickets=None, scheduler=scheduler)
    for _ in range(20):
        for worker in range(3):
            trial.push(worker)
    assert (trial.server.iteration, trial.server.status) == (60, Status.running)
    assert sorted(reply.ticket for reply in trial.held.values() if reply.ticket is not None) == [60, 61, 62]


def test_a_repeated_push_is_applied_once_and_gets_the_identical_reply() -> None:
    trial = begin()
    push = trial.work(1)
    (reply,) = trial.server.receive(push)
    state = trial.server.state_dict()
    trial.push(0)  # others go on in between
    between = trial.server.state_dict()
    (again,) = trial.server.receive(push)
    assert again is reply
    assert same(trial.server.state_dict(), between)
    assert trial.server.iteration == state["iteration"] + 1
    assert trial.kinds[-1] == "repeat"


def test_a_push_repeated_while_its_reply_is_held_at_the_barrier_gets_no_reply_yet() -> None:
    trial = begin(scheduler="sync")
    push = trial.work(1)
    assert trial.server.receive(push) == []
    held = trial.server.state_dict()
    assert trial.server.receive(push) == []
    assert same(trial.server.state_dict(), held)
    trial.push(0)
    replies = trial.push(2)
    assert brief(replies) == [(1, 3, 3), (0, 4, 3), (2, 5, 3)]
    assert trial.server.receive(push) == [replies[0]]
    assert trial.server.receive(push)[0] is replies[0]


def test_a_push_repeated_after_the_end_gets_the_last_reply_again() -> None:
    trial = begin(num_workers=2, tickets=2)
    early, last = trial.work(0), trial.work(1)
    assert trial.server.receive(early) == [], "no ticket is left, but one may come back"
    assert trial.server.receive(early) == []
    replies = trial.server.receive(last)
    assert brief(replies) == [(0, None, 2), (1, None, 2)]
    assert trial.server.receive(last)[0] is replies[1]
    assert trial.server.receive(early)[0] is replies[0]
    assert trial.server.iteration == 2


def test_the_same_push_repeated_by_another_worker_is_refused() -> None:
    trial = begin()
    push = trial.work(1)
    trial.server.receive(push)
    with pytest.raises(PushRefused, match=r"^push of worker 2: ticket: got 1, which is settled already; only a w"):
        trial.server.receive(replace(push, worker=2))
