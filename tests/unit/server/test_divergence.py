"""Gradients and parameters that are not finite."""

from __future__ import annotations

import math

import pytest
import torch

from ormo_rpc.server import parameter_server as server_module
from ormo_rpc.server.events import Kind
from ormo_rpc.server.parameter_server import Status
from tests.support.trial import ONE, begin, brief


def test_a_ticket_with_a_non_finite_gradient_goes_to_another_worker() -> None:
    trial = begin()
    bad = trial.work(1, math.nan * ONE)
    (reply,) = trial.note(trial.server.receive(bad))
    assert brief([reply]) == [(1, 3, 0)], "the sender gets other work"
    assert trial.server.receive(bad)[0] is reply, "a repeat of it settles nothing twice"
    assert brief(trial.push(0)) == [(0, 1, 1)], "the ticket goes to the next one that asks"
    assert (trial.server.status, trial.server.iteration) == (Status.running, 1)
    (discarded,) = [event.data for event in trial.events if event.kind is Kind.discard]
    assert (discarded["worker"], discarded["ticket"], discarded["reason"]) == (1, 1, "not finite")


def test_the_sender_of_a_non_finite_gradient_does_not_get_the_ticket_again() -> None:
    trial = begin(num_workers=2, tickets=2)
    assert trial.server.receive(trial.work(0, math.nan * ONE)) == []
    assert brief(trial.push(1)) == [(1, 0, 1)]
    assert brief(trial.push(1)) == [(0, None, 2), (1, None, 2)]
    assert trial.server.status is Status.completed


def test_the_sender_gets_its_ticket_again_when_all_others_have_left() -> None:
    trial = begin(num_workers=2, tickets=2)
    trial.server.receive(trial.work(0, math.nan * ONE))
    assert brief(trial.note(trial.server.leave(1))) == [(0, 0, 0)]


@pytest.mark.parametrize("scheduler", ["async", "sync"])
def test_a_ticket_with_non_finite_gradients_of_two_workers_ends_the_run(scheduler: str) -> None:
    trial = begin(scheduler=scheduler)
    trial.note(trial.server.receive(trial.work(0, math.nan * ONE)))
    trial.push(1)
    trial.push(2)
    (second,) = [reply.worker for reply in trial.held.values() if reply.ticket == 0 and reply.worker != 0]
    trial.note(trial.server.receive(trial.work(second, math.inf * ONE)))
    assert trial.server.status is Status.diverged
    assert trial.held[second].ticket is None
    before = trial.server.params.clone()
    for worker in {0, 1, 2} - {second}:
        if trial.held[worker].ticket is not None:
            trial.push(worker)
        assert trial.held[worker].ticket is None
    assert torch.equal(trial.server.params, before), "nothing is applied after the end"
    assert not trial.server.assignments.outstanding


def test_two_non_finite_gradients_of_the_only_worker_end_the_run() -> None:
    trial = begin(num_workers=1)
    assert brief(trial.note(trial.server.receive(trial.work(0, math.nan * ONE)))) == [(0, 0, 0)]
    assert trial.server.status is Status.running
    assert brief(trial.server.receive(trial.work(0, math.nan * ONE))) == [(0, None, 0)]
    assert trial.server.status is Status.diverged


def test_a_non_finite_gradient_at_non_finite_parameters_ends_the_run() -> None:
    trial = begin(num_workers=2, lr=10.0)
    trial.push(0, 1e308 * ONE)  # w = -inf, and nobody has looked yet
    assert trial.server.status is Status.running
    assert brief(trial.server.receive(trial.work(0, math.nan * ONE))) == [(0, None, 1)]
    assert trial.server.status is Status.diverged


def test_a_finite_gradient_for_a_reissued_ticket_clears_the_refusal() -> None:
    trial = begin(num_workers=1)
    trial.note(trial.server.receive(trial.work(0, math.nan * ONE)))
    assert brief(trial.push(0)) == [(0, 1, 1)]
    trial.note(trial.server.receive(trial.work(0, math.nan * ONE)))
    assert trial.server.status is Status.running
    assert trial.server.assignments.refused_by == {1: {0}}


@pytest.mark.parametrize("scheduler", ["async", "sync"])
def test_parameters_that_overflow_end_the_run(scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # w = 0 - 10 * 1e308 = -inf with the first push; it is seen at the next look.
    monkeypatch.setattr(server_module, "FINITE_CHECK_INTERVAL", 2)
    trial = begin(num_workers=2, scheduler=scheduler, lr=10.0)
    trial.push(0, 1e308 * ONE)
    replies = trial.push(1)
    assert trial.server.status is Status.diverged
    assert {reply.ticket for reply in replies} == {None}
    assert trial.server.iteration == 2
    if scheduler == "async":
        assert brief(trial.push(0)) == [(0, None, 2)]
    assert trial.server.iteration == 2
    assert {reply.ticket for reply in trial.held.values()} == {None}


def test_an_overflow_in_the_last_update_is_noticed() -> None:
    trial = begin(tickets=1, lr=10.0)
    trial.push(0, 1e308 * ONE)
    assert trial.server.status is Status.diverged
