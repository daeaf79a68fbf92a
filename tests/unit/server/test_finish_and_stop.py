"""The early end of a run, by `finish` or `stop`."""

from __future__ import annotations

import torch

from ormo_rpc.server.parameter_server import Status
from tests.support.trial import begin, brief


def test_finish_waits_for_outstanding_tickets() -> None:
    trial = begin(num_workers=2, tickets=None)
    trial.push(0)
    assert trial.server.finish() == []
    assert trial.push(0) == []
    assert trial.server.status is Status.running
    assert brief(trial.push(1)) == [(0, None, 3), (1, None, 3)]
    assert trial.server.status is Status.completed


def test_finish_under_a_barrier_ends_with_its_round() -> None:
    trial = begin(num_workers=3, scheduler="sync")
    trial.push(0)
    assert trial.server.finish() == []
    assert trial.push(1) == []
    assert brief(trial.push(2)) == [(0, None, 3), (1, None, 3), (2, None, 3)]


def test_finish_does_not_reissue_a_returned_ticket() -> None:
    trial = begin(num_workers=3)
    trial.server.leave(1)
    assert trial.server.finish() == []
    assert trial.push(0) == []
    assert brief(trial.push(2)) == [(0, None, 2), (2, None, 2)]
    assert (trial.server.status, trial.server.iteration) == (Status.completed, 2)


def test_a_ticket_returned_after_finish_is_reissued() -> None:
    trial = begin(num_workers=2)
    trial.server.finish()
    assert trial.push(0) == []
    assert brief(trial.note(trial.server.leave(1))) == [(0, 1, 1)]
    assert brief(trial.push(0)) == [(0, None, 2)]


def test_finish_with_nothing_outstanding_ends_at_once() -> None:
    trial = begin(num_workers=1)
    trial.server.leave(0)
    trial.server.finish()
    assert trial.server.status is Status.completed
    assert brief(trial.server.join(0)) == [(0, None, 0)]


def test_stop_ends_the_run_and_later_pushes_are_not_applied() -> None:
    trial = begin(num_workers=3, scheduler="sync")
    trial.push(0)
    assert brief(trial.server.stop()) == [(0, None, 1)]
    before = trial.server.params.clone()
    assert [brief(trial.push(worker)) for worker in (2, 1)] == [[(2, None, 1)], [(1, None, 1)]]
    assert torch.equal(trial.server.params, before)
    assert (trial.server.status, trial.server.iteration) == (Status.stopped, 1)
