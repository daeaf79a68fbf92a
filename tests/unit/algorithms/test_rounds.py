"""Synchronous algorithms, m-synchronous SGD and local SGD: torch.optim, plain loops, and who makes up a round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ormo_rpc.algorithms.base import LocalWork
from ormo_rpc.messages import Push, Reply
from ormo_rpc.server.build import build_server
from ormo_rpc.server.events import Event, Kind
from ormo_rpc.server.parameter_server import ParameterServer, Status
from tests.support.buffers import averages
from tests.support.quadratic import BETA, D, begin, close
from tests.support.schedule import Quadratic, Run, Schedule, answer, noise, schedules

CHANGING = (0.1, 0.1, 0.02, 0.0, 0.05)


def erratic(iteration: int) -> float:
    return CHANGING[iteration % len(CHANGING)]


class TorchSgd:
    """``torch.optim.SGD`` that is given its gradients."""

    def __init__(self, start: Tensor, **options: Any) -> None:
        self.parameter = nn.Parameter(start.clone())
        self.optimizer = torch.optim.SGD([self.parameter], **options)

    def step(self, gradient: Tensor, lr: float | None = None) -> Tensor:
        if lr is not None:
            self.optimizer.param_groups[0]["lr"] = lr
        self.parameter.grad = gradient.clone()
        self.optimizer.step()
        return self.parameter.detach()


def mean(pushes: list[Push]) -> Tensor:
    """The sum of the gradients in the order of their pushes, divided by their number."""
    total = torch.zeros_like(pushes[0].grad)
    for push in pushes:
        total = total + push.grad
    return total / len(pushes)


# ------------------------------------------------------------------------------------------------------------- m_sync


@pytest.mark.parametrize("nesterov", [False, True])
@given(schedule=schedules(), num_workers=st.integers(1, 5), beta=st.sampled_from([0.5, 0.9]))
def test_m_sync_of_all_workers_is_torch_sgd_on_the_mean_to_the_bit(
    nesterov: bool, schedule: Schedule, num_workers: int, beta: float
) -> None:
    tickets = 4 * num_workers
    options: dict[str, Any] = {"momentum": beta, "lr": erratic, "nesterov": nesterov}
    run = begin("m_sync", num_workers=num_workers, tickets=tickets, gradient=noise(D), **options)
    sgd = TorchSgd(run.server.params, lr=1.0, momentum=beta, nesterov=nesterov)
    expected = run.server.params.clone()
    for number, _ in enumerate(run.steps(schedule), 1):
        if number % num_workers == 0:
            expected = sgd.step(mean(run.pushes[-num_workers:]), erratic(number - 1))
        assert torch.equal(run.server.params, expected)
    assert run.server.iteration == tickets


@given(schedule=schedules(), num_workers=st.integers(1, 5), tickets=st.integers(1, 23))
def test_m_sync_of_all_workers_is_ordered_momentum_under_sync_on_the_mean(
    schedule: Schedule, num_workers: int, tickets: int
) -> None:
    recorded: tuple[list[Event], list[Event]] = ([], [])
    ours = begin("m_sync", num_workers=num_workers, tickets=tickets, gradient=noise(D), record=recorded[0].append)
    size = {"num_workers": num_workers, "tickets": tickets}
    theirs = begin("ormo", **size, scheduler="sync", lr=0.1 / num_workers, gradient=noise(D), record=recorded[1].append)
    for one, other in zip(ours.steps(schedule), theirs.steps(schedule), strict=True):
        for reply, expected in zip(one.replies, other.replies, strict=True):
            assert (reply.worker, reply.ticket, reply.stamp) == (expected.worker, expected.ticket, expected.stamp)
            if tickets % num_workers == 0 or reply.ticket is not None:  # a short last round has a mean of its own
                close(reply.params, expected.params, atol=1e-12)
    # The events are the same but for the rate, which has the factor 1 / K.
    lines = [[{**event.data, "eta": None, "kind": event.kind} for event in events] for events in recorded]
    assert lines[0] == lines[1]


@given(schedule=schedules(changes=True, max_size=60), m=st.integers(1, 4), cancel=st.booleans(), num_workers=st.integers(1, 5))
def test_a_round_of_m_sync_has_m_distinct_workers_gradients_at_the_present_parameters(
    schedule: Schedule, m: int, cancel: bool, num_workers: int
) -> None:
    events: list[Event] = []
    options: dict[str, Any] = {"m": m, "cancel": cancel, "gradient": noise(D), "record": events.append}
    run = begin("m_sync", num_workers=num_workers, tickets=30, **options)
    given_out = {reply.worker: reply for reply in run.outstanding.values()}
    contributors = list[tuple[int, int]]()
    stays, before = dict[int, int](), run.server.params.clone()
    for step in run.steps(schedule):
        if step.kind == "join":
            stays[step.worker] = stays.get(step.worker, 0) + 1
        if step.push is not None:
            fate = [event.kind for event in events if event.kind in (Kind.apply, Kind.discard)][-1]
            at_present = torch.equal(given_out[step.worker].params, before)
            assert (fate is Kind.apply) == at_present
            if at_present:
                contributors.append((step.worker, stays.get(step.worker, 0)))
        assert len(contributors) == len(set(contributors)) <= m
        if not torch.equal(run.server.params, before):
            everybody = {(worker, stays.get(worker, 0)) for worker in run.members}
            assert len(contributors) == m or everybody <= set(contributors) or run.server.ended
            contributors, before = [], run.server.params.clone()
        given_out |= {reply.worker: reply for reply in step.replies}
    assert run.server.status is Status.completed
    applied = sorted(event.data["ticket"] for event in events if event.kind is Kind.apply)
    assert applied == list(range(30))
    if cancel:
        assert not [event for event in events if event.kind is Kind.discard]


def of_workers(num_workers: int) -> Callable[[Reply], Tensor]:
    """Gradients of a loss of each worker's own."""
    problems = [Quadratic(D, smallest=0.1, seed=worker) for worker in range(num_workers)]
    return lambda reply: problems[reply.worker].gradient_at(reply.params)


def newest(run: Run[ParameterServer], worker: int) -> Reply | None:
    """The reply that a worker has to answer."""
    return next((reply for reply in run.outstanding.values() if reply.worker == worker), None)


@given(order=st.lists(st.permutations(range(4)), min_size=1, max_size=8))
def test_m_sync_is_rennala_where_no_worker_is_in_a_round_twice(order: list[list[int]]) -> None:
    begun: dict[str, Any] = {"num_workers": 4, "tickets": 100, "momentum": 0.0, "gradient": of_workers(4)}
    runs = [begin("m_sync", m=3, **begun), begin("rennala", batch=3, **begun)]
    for first in order:
        for run in runs:
            for worker in first[:3]:
                before = run.server.iteration
                while run.server.iteration == before:  # what it was computing at old parameters is discarded first
                    reply = newest(run, worker)
                    assert reply is not None
                    run.push(reply)
        close(runs[0].server.params, runs[1].server.params)


def test_a_fast_worker_gives_rennala_several_gradients_of_a_step_and_m_sync_one() -> None:
    ours = begin("m_sync", num_workers=3, tickets=20, gradient=of_workers(3), m=2)
    theirs = begin("rennala", num_workers=3, tickets=20, gradient=of_workers(3), batch=2)
    for run in (ours, theirs):
        reply = newest(run, 0)
        assert reply is not None
        run.push(reply)
    assert newest(ours, 0) is None, "it waits"
    second = newest(theirs, 0)
    assert second is not None
    start = theirs.server.params.clone()
    theirs.push(second)
    assert not torch.equal(theirs.server.params, start), "a step of worker 0 alone"


def test_buffers_are_those_of_the_gradients_that_made_a_step() -> None:
    buffers = averages({"mean": torch.zeros(1)}, {"mean": 0.5})
    server = build_server(algorithm="m_sync", m=2, params=torch.zeros(2), num_workers=3, lr=0.1, buffers=buffers)
    replies = {reply.worker: reply for reply in server.start()}

    def push(worker: int, value: float) -> None:
        one = answer(replies[worker], torch.ones(2))
        reported = {"mean": torch.tensor([value])}
        again = server.receive(Push(worker=worker, ticket=one.ticket, stamp=one.stamp, grad=one.grad, buffers=reported))
        replies.update({reply.worker: reply for reply in again})

    push(0, 4.0)
    push(1, 8.0)
    assert buffers.current["mean"].tolist() == [5.0], "0.5 * (0.5 * 0 + 0.5 * 4) + 0.5 * 8"
    push(2, 100.0)
    assert buffers.current["mean"].tolist() == [5.0], "taken at old parameters"


def test_more_gradients_than_there_are_workers_are_not_waited_for() -> None:
    run = begin("m_sync", num_workers=2, tickets=8, gradient=noise(D), m=5)
    sgd = TorchSgd(run.server.params, lr=0.1, momentum=BETA)
    for number, _ in enumerate(run.steps([]), 1):
        if number % 2 == 0:
            assert torch.equal(run.server.params, sgd.step(mean(run.pushes[-2:])))


# ---------------------------------------------------------------------------------------------------------- local SGD


@given(schedule=schedules(), num_workers=st.integers(1, 4))
def test_local_sgd_of_one_step_is_synchronous_sgd_on_the_mean(schedule: Schedule, num_workers: int) -> None:
    run = begin("local_sgd", num_workers=num_workers, tickets=4 * num_workers, local_steps=1)
    sgd = begin("asgd", num_workers=num_workers, tickets=4 * num_workers, scheduler="sync", lr=0.1 / num_workers)
    for one, other in zip(run.steps(schedule), sgd.steps(schedule), strict=True):
        for reply, expected in zip(one.replies, other.replies, strict=True):
            assert (reply.worker, reply.ticket, reply.stamp) == (expected.worker, expected.ticket, expected.stamp)
            close(reply.params, expected.params, atol=1e-12)


@pytest.mark.parametrize(
    "outer", [{}, {"outer_lr": 0.7, "outer_momentum": 0.9}, {"outer_momentum": 0.9, "outer_nesterov": False}], ids=str
)
@given(schedule=schedules(), num_workers=st.integers(1, 4))
def test_the_outer_step_of_local_sgd_is_torchs_on_the_mean_displacement_to_the_bit(
    outer: dict[str, Any], schedule: Schedule, num_workers: int
) -> None:
    run = begin("local_sgd", num_workers=num_workers, tickets=5 * num_workers, gradient=noise(D), **outer)
    mu = outer.get("outer_momentum", 0.0)
    nesterov = outer.get("outer_nesterov", True) and mu > 0
    sgd = TorchSgd(run.server.params, lr=outer.get("outer_lr", 1.0), momentum=mu, nesterov=nesterov)
    for number, _ in enumerate(run.steps(schedule), 1):
        if number % num_workers == 0:
            assert torch.equal(run.server.params, sgd.step(mean(run.pushes[-num_workers:])))


@pytest.mark.parametrize("local_steps", [1, 3, 5])
@pytest.mark.parametrize(("outer_lr", "outer_momentum"), [(1.0, 0.0), (0.7, 0.9)])
def test_local_sgd_is_the_plain_loop_of_torch(local_steps: int, outer_lr: float, outer_momentum: float) -> None:
    workers, rounds = 3, 6
    problems = [Quadratic(D, smallest=0.1, seed=worker) for worker in range(workers)]
    options: dict[str, Any] = {"local_steps": local_steps, "outer_lr": outer_lr, "outer_momentum": outer_momentum}
    run = begin("local_sgd", num_workers=workers, tickets=workers * rounds, **options)

    def local(reply: Reply) -> Tensor:
        result = torch.zeros(D, dtype=torch.float64)

        def gradient(params: Tensor, step: int, into: Tensor) -> None:  # noqa: ARG001 - all batches are the same
            into.copy_(problems[reply.worker].gradient_at(params))

        work = LocalWork(sent=reply.params, dimension=D, lr=reply.lr, momentum=BETA, steps=reply.steps, gradient=gradient)
        run.server.algorithm.local(work, result)
        return result

    run.gradient = local
    outer = TorchSgd(run.server.params, lr=outer_lr, momentum=outer_momentum, nesterov=outer_momentum > 0)
    for _ in range(rounds):
        for reply in list(run.outstanding.values()):
            run.push(reply)
        start, ends = outer.parameter.detach().clone(), list[Tensor]()
        for problem in problems:
            inner = TorchSgd(start, lr=0.1, momentum=BETA)
            for _ in range(local_steps):
                inner.step(problem.gradient_at(inner.parameter.detach()))
            ends.append(inner.parameter.detach())
        close(run.server.params, outer.step(start - torch.stack(ends).mean(0)), atol=1e-12)
