"""The loss scale: a `GradScaler` where there is one worker, and a rule for late gradients where there are several."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ormo_rpc.algorithms.base import LocalWork
from ormo_rpc.errors import GradientOverflow, PushRefused
from ormo_rpc.messages import Reply
from ormo_rpc.options import find, parts
from ormo_rpc.server.events import Kind
from ormo_rpc.server.loss_scale import INITIAL, INTERVAL, SMALLEST, LossScale
from ormo_rpc.server.parameter_server import OVERFLOW, Status
from ormo_rpc.server.validation import NormLimit, NormPolicy
from tests.support.examples import examples
from tests.support.schedule import answer, normal
from tests.support.trial import ONE, begin, brief

NAN = math.nan * ONE
SCALED: dict[str, Any] = {"loss_scale": LossScale(initial=8.0, interval=3)}


def scaler_of_torch(initial: float, interval: int) -> tuple[torch.amp.GradScaler, Tensor]:
    """A `GradScaler`, once it was used as it must be before its first update, and its parameter."""
    scaler = torch.amp.GradScaler("cpu", init_scale=initial, growth_interval=interval)
    scaler.scale(torch.zeros(1))
    return scaler, torch.zeros(1, requires_grad=True)


def test_the_defaults_are_those_of_grad_scaler() -> None:
    scaler = torch.amp.GradScaler("cpu")
    assert (scaler.get_scale(), scaler.get_growth_interval()) == (INITIAL, INTERVAL)
    assert (LossScale().value, LossScale().interval) == (INITIAL, INTERVAL)


@examples(60)
@given(
    finite=st.lists(st.sampled_from([True, True, True, False]), max_size=60),
    initial=st.sampled_from([65536.0, 1.0, 0.3, 2.0**127, 3.0e38]),
    interval=st.sampled_from([1, 2, 5]),
)
def test_one_worker_has_the_scales_of_grad_scaler(finite: list[bool], initial: float, interval: int) -> None:
    ours = LossScale(initial=initial, interval=interval)
    scaler, parameter = scaler_of_torch(initial, interval)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    for each in finite:
        assert ours.value == scaler.get_scale()
        parameter.grad = torch.tensor([1.0 if each else math.inf])
        scaler.step(optimizer)
        scaler.update()
        ours.applied(ours.value) if each else ours.overflowed(ours.value)
    assert ours.value == scaler.get_scale()


@pytest.mark.parametrize("initial", [0.0, -1.0, math.inf, math.nan, SMALLEST / 2, 1e39])
def test_a_scale_that_cannot_be_is_refused(initial: float) -> None:
    with pytest.raises(ValueError, match=r"^loss_scale: initial: got .*, expected a float32 >= 0.0009765625$"):
        LossScale(initial=initial)


def test_an_interval_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^loss_scale: interval: got 0, expected at least 1$"):
        LossScale(interval=0)


def test_an_overflow_lowers_the_scale_and_its_ticket_is_issued_again_to_anyone() -> None:
    trial = begin(num_workers=2, **SCALED)
    assert [reply.loss_scale for reply in trial.held.values()] == [8.0, 8.0]
    (reply,) = trial.note(trial.server.receive(trial.work(0, NAN)))
    assert (brief([reply]), reply.loss_scale) == ([(0, 0, 0)], 4.0)
    assert trial.server.status is Status.running
    (event,) = [event.data for event in trial.events if event.kind is Kind.discard]
    assert event["reason"] == f"{OVERFLOW} 8"


def test_late_overflows_at_an_older_scale_do_not_lower_it_again() -> None:
    trial = begin(num_workers=3, **SCALED)
    for worker in range(3):
        (reply,) = trial.note(trial.server.receive(trial.work(worker, NAN)))
        assert reply.loss_scale == 4.0
    trial.note(trial.server.receive(trial.work(0, NAN)))
    assert trial.held[0].loss_scale == 2.0


def test_only_gradients_at_the_present_scale_or_above_count_towards_growth() -> None:
    trial = begin(num_workers=2, tickets=None, **SCALED)
    for _ in range(3):
        trial.push(0)
    assert trial.held[0].loss_scale == 16.0
    trial.push(1)  # at 8, which says nothing of 16
    for expected in (16.0, 16.0, 32.0):
        trial.push(0)
        assert trial.held[0].loss_scale == expected


def test_an_overflow_below_the_present_scale_lowers_it_further() -> None:
    trial = begin(num_workers=2, tickets=None, **SCALED)
    for _ in range(3):
        trial.push(0)
    trial.note(trial.server.receive(trial.work(1, NAN)))  # at 8, while the present one is 16
    assert trial.held[1].loss_scale == 4.0


def test_a_repeat_of_a_push_that_overflowed_is_not_taken_for_the_answer_to_the_same_ticket() -> None:
    trial = begin(num_workers=1, **SCALED)
    bad = trial.work(0, NAN)
    (reply,) = trial.note(trial.server.receive(bad))
    assert brief([reply]) == [(0, 0, 0)], "the same ticket, worker and stamp"
    assert trial.server.receive(bad) == [reply]
    assert trial.server.receive(bad)[0] is reply
    assert reply.loss_scale == 4.0
    assert [event.data.get("loss_scale") for event in trial.events if event.kind is Kind.repeat] == [8.0, 8.0]
    trial.push(0)
    assert trial.server.iteration == 1


def test_a_push_at_another_scale_than_that_of_its_reply_is_refused() -> None:
    trial = begin(**SCALED)
    message = r"^push of worker 0 for ticket 0: loss_scale: got 1, expected 8, that of the reply$"
    with pytest.raises(PushRefused, match=message):
        trial.push(0, loss_scale=1.0)
    assert trial.server.iteration == 0


def test_gradients_that_overflow_at_every_scale_end_the_run_as_diverged() -> None:
    trial = begin(num_workers=2, **SCALED)
    scales: list[float] = []
    while not trial.server.ended:
        scales.append(trial.held[0].loss_scale)
        trial.note(trial.server.receive(trial.work(0, NAN)))
    assert scales == [2.0**power for power in range(3, -11, -1)]
    assert trial.server.status is Status.diverged
    state = trial.server.state_dict()
    again = begin(num_workers=2, start=False, **SCALED).server
    again.load_state_dict(state)
    assert [reply.loss_scale for reply in again.start()] == [8.0, 8.0], "resumed, it begins with the first scale"


def test_an_overflow_at_parameters_that_are_not_finite_ends_the_run() -> None:
    trial = begin(num_workers=2, lr=10.0, **SCALED)
    trial.push(0, 1e308 * ONE)
    trial.note(trial.server.receive(trial.work(0, NAN)))
    assert trial.server.status is Status.diverged


def test_a_gradient_that_is_too_large_for_the_limit_is_no_overflow() -> None:
    trial = begin(num_workers=1, norm_limit=NormLimit(1.0, NormPolicy.refuse), **SCALED)
    trial.note(trial.server.receive(trial.work(0, 100 * ONE)))
    assert trial.held[0].loss_scale == 8.0
    trial.note(trial.server.receive(trial.work(0, 100 * ONE)))
    assert trial.server.status is Status.diverged


def test_a_loss_that_is_not_finite_is_an_overflow_as_well() -> None:
    trial = begin(num_workers=1, **SCALED)
    trial.push(0, loss=math.inf)
    assert (trial.held[0].loss_scale, trial.server.iteration) == (4.0, 0)


def test_the_scale_is_saved_and_a_state_without_one_begins_with_the_first() -> None:
    trial = begin(num_workers=1, tickets=None, **SCALED)
    trial.note(trial.server.receive(trial.work(0, NAN)))
    for _ in range(4):
        trial.push(0)
    state = trial.server.state_dict()
    again = begin(num_workers=1, tickets=None, start=False, **SCALED).server
    again.load_state_dict(state)
    assert again.loss_scale == trial.server.loss_scale
    assert [reply.loss_scale for reply in again.start()] == [8.0]
    older = begin(num_workers=1, tickets=None, start=False, **SCALED).server
    older.load_state_dict({**state, "loss_scale": None})
    assert [reply.loss_scale for reply in older.start()] == [8.0]
    without = begin(num_workers=1, tickets=None, start=False).server
    without.load_state_dict(state)
    assert [reply.loss_scale for reply in without.start()] == [1.0]


@examples(40)
@given(
    picks=st.lists(st.integers(0, 99), max_size=80),
    limits=st.lists(st.sampled_from([2.0**power for power in range(-6, 12)]), min_size=1, max_size=6),
    num_workers=st.integers(1, 4),
    algorithm=st.sampled_from(["asgd", "ormo", "rennala"]),
)
def test_under_any_order_of_arrivals_the_scale_follows_its_rule_and_nothing_is_lost(
    picks: list[int], limits: list[float], num_workers: int, algorithm: str
) -> None:
    trial = begin(num_workers=num_workers, tickets=None, algorithm=algorithm, lr=0.01, **SCALED)
    held = dict(trial.held)
    settled: list[tuple[float, str]] = []
    applied: list[int] = []
    for count, pick in enumerate(picks):
        reply = held[sorted(held)[pick % len(held)]]
        assert reply.ticket is not None
        overflows = reply.loss_scale > limits[count % len(limits)]
        grad = NAN if overflows else normal(3, 0, reply.ticket)
        before = trial.server.iteration
        for answered in trial.server.receive(replace(answer(reply, grad), loss=1.0)):
            held[answered.worker] = answered
        was_applied = trial.server.iteration > before
        if was_applied:
            applied.append(reply.ticket)
        settled.append((reply.loss_scale, "overflow" if overflows else "applied" if was_applied else "discarded"))
        assert trial.server.status is Status.running
        assert held[reply.worker].loss_scale == expected_scale(settled, 8.0, 3)
        assert sorted(trial.server.members) == list(range(num_workers))
    assert len(applied) == len(set(applied))
    again = begin(num_workers=num_workers, tickets=None, algorithm=algorithm, lr=0.01, start=False, **SCALED).server
    again.load_state_dict(trial.server.state_dict(replies=True))
    assert again.loss_scale == trial.server.loss_scale


def expected_scale(settled: list[tuple[float, str]], scale: float, interval: int) -> float:
    """Derive the scale from all gradients so far: those it was computed at, and what became of them."""
    run = 0
    for used, outcome in settled:
        if outcome == "overflow" and used == scale:
            scale, run = scale / 2, 0
        elif outcome == "overflow" and used < scale:  # it has grown since
            scale, run = used / 2, 0
        elif outcome == "applied" and used >= scale:
            run += 1
            if run == interval:
                scale, run = scale * 2, 0
    return scale


def test_validation_alone_tells_an_overflow() -> None:
    scaled, plain = begin(**SCALED), begin()
    assert isinstance(scaled.server.validate(scaled.work(0, NAN)).rejected, GradientOverflow)
    assert not isinstance(plain.server.validate(plain.work(0, NAN)).rejected, GradientOverflow)


def test_without_a_scale_replies_have_one_of_1() -> None:
    replies: list[Reply] = list(begin().held.values())
    assert {reply.loss_scale for reply in replies} == {1.0}


@pytest.mark.parametrize("name", ["asgd", *(name for name, part in parts("algorithm").items() if "local" in vars(part))])
def test_one_overflow_among_local_steps_makes_the_push_one(name: str) -> None:
    algorithm = find("algorithm", name)()

    def gradient(params: Tensor, step: int, into: Tensor) -> None:
        into.copy_(params[:3] if step else params[:3] + math.inf)

    push = torch.zeros(algorithm.VECTORS_PUSHED * 3)
    sent = torch.ones(algorithm.VECTORS_PUSHED * 3)
    algorithm.local(LocalWork(sent=sent, dimension=3, lr=0.1, momentum=0.5, steps=3, gradient=gradient), push)
    assert not torch.isfinite(push).all()
