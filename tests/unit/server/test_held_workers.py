"""Workers that an algorithm holds back, and tickets that it takes back: what the server makes of `held` and `cancelled`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from ormo_rpc import Algorithm, PushContext
from ormo_rpc.algorithms.base import PullContext
from ormo_rpc.errors import RunFailed
from ormo_rpc.server.build import build_server
from ormo_rpc.server.events import Kind
from ormo_rpc.server.parameter_server import Status
from tests.support.contract import same
from tests.support.trial import ONE, Trial, begin, brief


@dataclass(kw_only=True)
class Rounds(Algorithm):
    """The sum of the first ``size`` gradients is a step; who has brought one is held, and the others are cancelled if asked."""

    size: int = 3
    cancel: bool = False

    @override
    def init(self, params: Tensor, momentum: float) -> None:
        super().init(params, momentum)
        self.total = self.zeros()
        self.rounds = 0
        self.brought: dict[int, int] = {}
        self.working: dict[int, int] = {}

    @override
    def step(self, grad: Tensor, lr: float, context: PushContext) -> None:
        self.total += lr * grad
        self.brought[context.worker] = 1
        if len(self.brought) == self.size:
            self.flush(lr)

    @override
    def flush(self, lr: float) -> None:
        self.params -= self.total
        self.total.zero_()
        self.rounds += 1
        self.brought.clear()

    @override
    def leave(self, worker: int) -> None:
        self.brought.pop(worker, None)

    @override
    def held(self) -> Collection[int]:
        return self.brought

    @property
    @override
    def cancels(self) -> bool:
        return self.cancel

    @override
    def outgoing(self, context: PullContext) -> Tensor:
        self.working[context.worker] = self.rounds
        return super().outgoing(context)

    @override
    def cancelled(self) -> Collection[int]:
        return [worker for worker, rounds in self.working.items() if rounds < self.rounds]

    @override
    def state_dict(self) -> Mapping[str, Tensor | int | float]:
        workers = {**self.by_worker("brought", self.brought), **self.by_worker("working", self.working)}
        return {"total": self.total, "rounds": self.rounds, **workers}


@dataclass(kw_only=True)
class HoldsAll(Algorithm):
    """A mistake: everybody is held, for ever."""

    @override
    def step(self, grad: Tensor, lr: float, context: PushContext) -> None:
        self.params -= lr * grad

    @override
    def held(self) -> Collection[int]:
        return range(100)


def rounds(*, num_workers: int = 3, tickets: int | None = 12, size: int = 3, cancel: bool = False, **options: Any) -> Trial:
    return begin(num_workers=num_workers, tickets=tickets, algorithm=Rounds(size=size, cancel=cancel), **options)


def test_workers_that_are_held_are_answered_together_in_the_order_of_their_pushes() -> None:
    trial = rounds()
    assert trial.push(2) == trial.push(0) == []
    assert torch.equal(trial.server.params, torch.zeros(3))
    replies = trial.push(1)
    assert brief(replies) == [(2, 3, 3), (0, 4, 3), (1, 5, 3)]
    assert torch.equal(trial.server.params, -1.5 * ONE)
    assert all(torch.equal(reply.params, trial.server.params) for reply in replies)


def test_a_push_that_a_held_worker_repeats_gets_nothing_and_changes_nothing() -> None:
    trial = rounds()
    push = trial.work(0)
    assert trial.server.receive(push) == []
    before = trial.server.state_dict()
    assert trial.server.receive(push) == []
    assert same(trial.server.state_dict(), before)
    assert trial.kinds[-1] == "repeat"


def test_a_round_ends_with_what_there_is_when_nobody_else_computes() -> None:
    trial = rounds(num_workers=2)
    assert trial.push(0) == []
    assert brief(trial.push(1)) == [(0, 2, 2), (1, 3, 2)], "a round of 3 with 2 workers"
    assert torch.equal(trial.server.params, -ONE)


def test_a_round_does_not_wait_for_a_worker_that_leaves() -> None:
    trial = rounds()
    trial.push(0)
    trial.push(1)
    replies = trial.note(trial.server.leave(2))
    assert brief(replies) == [(0, 2, 2), (1, 3, 2)]
    assert torch.equal(trial.server.params, -ONE)


def test_what_a_held_worker_brought_stays_when_it_leaves_and_its_number_counts_anew() -> None:
    trial = rounds()
    trial.push(0)
    assert trial.server.leave(0) == []
    (again,) = trial.note(trial.server.join(0))
    assert brief([again]) == [(0, 3, 1)]
    assert trial.push(0) == trial.push(1) == []
    assert len(trial.push(2)) == 3
    assert torch.equal(trial.server.params, -2 * ONE)


def test_finish_lets_the_round_end_with_the_tickets_that_are_out() -> None:
    trial = rounds(tickets=None)
    trial.push(0)
    assert trial.note(trial.server.finish()) == []
    assert trial.push(1) == []
    assert brief(trial.push(2)) == [(0, None, 3), (1, None, 3), (2, None, 3)]
    assert trial.server.status is Status.completed
    assert torch.equal(trial.server.params, -1.5 * ONE)


def test_stop_tells_held_workers_to_stop() -> None:
    trial = rounds()
    trial.push(0)
    assert brief(trial.server.stop()) == [(0, None, 1)]


def test_a_short_last_round_is_applied_and_all_are_told_to_stop() -> None:
    trial = rounds(tickets=4)
    for worker in (0, 1, 2):
        trial.push(worker)
    assert brief(trial.push(0)) == [(1, None, 4), (2, None, 4), (0, None, 4)]
    assert torch.equal(trial.server.params, -2 * ONE)


def test_held_workers_wait_while_there_are_too_few_and_their_round_goes_on_afterwards() -> None:
    trial = rounds(min_workers=3)
    trial.push(0)
    trial.push(1)
    assert trial.server.leave(2) == [], "paused"
    assert torch.equal(trial.server.params, torch.zeros(3))
    assert brief(trial.note(trial.server.join(3))) == [(3, 2, 2)]
    assert brief(trial.push(3)) == [(0, 3, 3), (1, 4, 3), (3, 5, 3)]
    assert torch.equal(trial.server.params, -1.5 * ONE)


@pytest.mark.parametrize("present", [[0, 1, 2], [1, 2]])
def test_a_server_that_restarts_goes_on_with_the_half_of_a_round_that_it_had(present: list[int]) -> None:
    trial = rounds()
    trial.push(0)
    state = trial.server.state_dict()
    fresh = rounds(start=False)
    fresh.server.load_state_dict(state)
    fresh.note(fresh.server.start(present))
    assert sorted(fresh.server.assignments.holding) == [1, 2], "worker 0 is still held, or has gone"
    assert torch.equal(fresh.server.params, torch.zeros(3))
    fresh.push(1)
    replies = fresh.push(2)
    assert {reply.worker for reply in replies} == set(present)
    assert torch.equal(fresh.server.params, -1.5 * ONE), "what worker 0 brought counts"


def test_a_server_that_restarts_with_held_workers_alone_ends_their_round() -> None:
    trial = rounds()
    trial.push(0)
    trial.push(1)
    fresh = rounds(start=False)
    fresh.server.load_state_dict(trial.server.state_dict())
    assert brief(fresh.server.start([0, 1])) == [(0, 2, 2), (1, 3, 2)]
    assert torch.equal(fresh.server.params, -ONE)
    assert sorted(fresh.server.assignments.holding) == [0, 1]


def test_an_algorithm_that_holds_everybody_for_ever_fails_the_run() -> None:
    server = build_server(algorithm=HoldsAll(), params=torch.zeros(3), num_workers=2, total_tickets=4)
    expected = r"^algorithm .*HoldsAll: held returned \[0, 1\] after flush although no worker computes, expected nobody$"
    with pytest.raises(RunFailed, match=expected):
        server.start()


@dataclass(kw_only=True)
class Forgetful(Rounds):
    """A mistake: who is held is no part of the state."""

    @override
    def state_dict(self) -> Mapping[str, Tensor | int | float]:
        return {"total": self.total, "rounds": self.rounds}


def test_an_algorithm_that_forgets_whom_it_holds_is_refused() -> None:
    server = build_server(algorithm=Forgetful(), params=torch.zeros(3), num_workers=3)
    with pytest.raises(ValueError, match=r"^algorithm: the state_dict of .*Forgetful leaves out brought; expected all that "):
        server.state_dict()


# ---------------------------------------------------------------------------------------------------------- cancelled


def test_tickets_that_are_void_are_taken_back_and_their_workers_answered_at_once() -> None:
    trial = rounds(num_workers=4, size=2, cancel=True)
    taken: list[int] = []
    trial.server.on_cancel = taken.extend
    assert trial.push(3) == []
    assert taken == []
    replies = trial.push(1)
    assert taken == [0, 2]
    assert brief(replies) == [(3, 0, 2), (1, 2, 2), (0, 4, 2), (2, 5, 2)], "the tickets that came back first"
    cancelled = [event.data for event in trial.events if event.kind is Kind.cancel]
    assert cancelled == [
        {"worker": 0, "ticket": 0, "stamp": 0, "bucket": 0},
        {"worker": 2, "ticket": 2, "stamp": 0, "bucket": 0},
    ]


def test_a_cancelled_worker_without_new_work_waits_and_is_told_to_stop() -> None:
    trial = rounds(num_workers=3, size=2, cancel=True, tickets=3)
    trial.push(0)
    assert brief(trial.push(1)) == [(0, 2, 2)], "ticket 2 was worker 2's"
    assert trial.server.members.idle == [1, 2]
    assert brief(trial.push(0)) == [(1, None, 3), (2, None, 3), (0, None, 3)]


def test_cancelled_tickets_of_a_run_that_finishes_are_still_done() -> None:
    trial = rounds(num_workers=3, size=2, cancel=True, tickets=None)
    trial.server.finish()
    trial.push(0)
    trial.push(1)
    trial.push(0)
    assert (trial.server.status, trial.server.iteration) == (Status.completed, 3)


@pytest.mark.parametrize("cancel", [False, True])
def test_a_state_in_the_middle_of_a_round_goes_on_to_the_bit(cancel: bool) -> None:
    trial = rounds(num_workers=4, size=2, cancel=cancel)
    for worker in (0, 2, 3):
        trial.push(worker, ONE * worker)
    fresh = rounds(num_workers=4, size=2, cancel=cancel, start=False)
    fresh.server.load_state_dict(trial.server.state_dict(replies=True))
    fresh.held = dict(trial.held)
    for worker in (1, 0, 2) if cancel else (1, 2, 0):
        first, second = (each.push(worker, ONE * worker) for each in (trial, fresh))
        assert brief(first) == brief(second)
    assert same(trial.server.state_dict(), fresh.server.state_dict())
