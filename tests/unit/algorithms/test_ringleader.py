"""Ringleader ASGD: cycles, delays, closed forms, and workers that come and go."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ormo_rpc.server.parameter_server import ParameterServer
from tests.support.quadratic import PROBLEM, D, begin, close, decaying
from tests.support.schedule import Run, Schedule, noise, schedules

ONES = torch.ones(D, dtype=torch.float64)


def push_of(run: Run[ParameterServer], worker: int) -> float:
    """Let a worker push; return how far the first parameter has gone down."""
    before = run.server.params.clone()
    run.push(next(reply for reply in run.outstanding.values() if reply.worker == worker))
    return float((before - run.server.params)[0])


@given(schedule=schedules(max_size=40), n=st.integers(1, 5))
def test_cycles_of_n_steps_of_old_gradients_in_closed_form(schedule: Schedule, n: int) -> None:
    run = begin("ringleader", num_workers=n, tickets=50, lr=decaying, gradient=noise(D))
    w = run.server.params.clone()
    points = dict.fromkeys(run.outstanding, 0)
    cycles: dict[int, dict[int, list[tuple[Tensor, int]]]] = defaultdict(lambda: defaultdict(list))
    steppers = list[int]()
    for t, step in zip(range(49), run.steps(schedule), strict=False):  # the last push ends the run and flushes
        assert step.push is not None
        done, point = len(steppers), points.pop((step.worker, step.push.ticket))
        stepped = not torch.equal(run.server.params, w)
        cycle = done // n + (done % n > 0 and not stepped)
        cycles[cycle][step.worker].append((step.push.grad, point))
        if stepped:
            table = cycles[cycle]
            assert len(table) == n
            assert max(done - taken for each in table.values() for _, taken in each) <= 2 * n - 2
            means = [torch.stack([grad for grad, _ in each]).mean(0) for each in table.values()]
            w = w - decaying(t) / n * torch.stack(means).sum(0)
            close(run.server.params, w, atol=1e-12)
            w = run.server.params.clone()
            steppers.append(step.worker)
        for reply in step.replies:
            assert torch.equal(reply.params, w)
            points[reply.worker, reply.ticket or 0] = len(steppers)
    # In each whole cycle, every worker steps once.
    for begun in range(0, len(steppers) - n + 1, n):
        assert sorted(steppers[begun : begun + n]) == list(range(n))


@given(schedule=schedules(), n=st.integers(1, 5), scheduler=st.sampled_from(["async", "sync", "partial", "ssp"]))
def test_a_constant_gradient_moves_the_parameters_by_eta_for_each_step(schedule: Schedule, n: int, scheduler: str) -> None:
    options: dict[str, Any] = {"partial": {"k": 2}, "ssp": {"s": 1}}.get(scheduler, {})
    run = begin("ringleader", num_workers=n, tickets=30, scheduler=scheduler, gradient=lambda _: ONES, **options)
    start = before = run.server.params.clone()
    steps = 0
    for _ in zip(range(29), run.steps(schedule), strict=False):
        steps += not torch.equal(run.server.params, before)
        before = run.server.params.clone()
        close(start - before, 0.1 * steps * ONES, atol=1e-12)


def test_slow_workers_count_as_much_as_fast_ones() -> None:
    # Each worker has a target of its own; the fast one of two pushes nine times in ten. asgd ends near the target of that.
    targets = {0: torch.zeros(D, dtype=torch.float64), 1: ONES}

    def end(name: str) -> float:
        run = begin(name, num_workers=2, tickets=600, lr=0.05, momentum=0.0)
        run.gradient = lambda reply: reply.params - targets[reply.worker]
        while run.outstanding:
            turn = 0 if len(run.pushes) % 10 else 1
            run.push(next((r for r in run.outstanding.values() if r.worker == turn), next(iter(run.outstanding.values()))))
        return float(run.server.params[0])

    assert end("asgd") == pytest.approx(0.1, abs=0.05)
    assert end("ringleader") == pytest.approx(0.5, abs=0.05)


# -------------------------------------------------------------------------------------------------- come, go and the end


def test_a_worker_that_is_missing_in_phase_1_may_leave() -> None:
    run = begin("ringleader", num_workers=3, tickets=40, gradient=lambda _: ONES)
    assert [push_of(run, worker) for worker in (0, 1, 0)] == [0.0, 0.0, 0.0]
    run.leave(2)
    # The next gradient finds a full table of two.
    assert [push_of(run, worker) for worker in (1, 0)] == pytest.approx([0.1, 0.1])
    assert push_of(run, 0) == 0.0, "the next cycle has begun"


def test_a_worker_that_has_yet_to_step_in_phase_2_may_leave() -> None:
    run = begin("ringleader", num_workers=3, tickets=40, gradient=lambda _: ONES)
    assert [push_of(run, worker) for worker in (0, 1, 2, 0, 2)] == pytest.approx([0.0, 0.0, 0.1, 0.1, 0.0])
    run.leave(1)
    # The cycle is over; worker 2 has an entry from phase 2, worker 0 has none.
    assert [push_of(run, worker) for worker in (2, 0, 2)] == pytest.approx([0.0, 0.1, 0.1])


def test_a_cycle_waits_for_a_worker_that_joins_in_phase_1_and_not_in_phase_2() -> None:
    run = begin("ringleader", num_workers=2, tickets=40, gradient=lambda _: ONES)
    assert push_of(run, 0) == 0.0
    run.join(2)
    assert [push_of(run, worker) for worker in (1, 0, 2)] == pytest.approx([0.0, 0.0, 0.1])
    run.join(3)
    assert [push_of(run, worker) for worker in (3, 0, 3, 1)] == pytest.approx([0.0, 0.1, 0.0, 0.1])
    # The new cycle counts all four, of whom 3 has an entry.
    assert [push_of(run, worker) for worker in (0, 1, 2, 3)] == pytest.approx([0.0, 0.0, 0.1, 0.1])


@pytest.mark.parametrize(
    ("order", "moved"),
    [
        ((0,), 1.0),  # who never gets a ticket is not waited for
        ((0, 1), 1.0),
        ((0, 1, 2), 1.0),
        ((0, 1, 2, 0), 2.0),  # in phase 2, and nothing is left
        ((0, 1, 2, 2, 0, 1), 3 + 1 / 3),  # three steps, and in phase 1 one mean of three
    ],
)
def test_at_the_end_what_has_not_acted_makes_a_step(order: tuple[int, ...], moved: float) -> None:
    run = begin("ringleader", num_workers=3, tickets=len(order), gradient=lambda _: ONES)
    for worker in order:
        push_of(run, worker)
    assert not run.outstanding
    close(torch.linspace(-1, 1, D, dtype=torch.float64) - run.server.params, 0.1 * moved * ONES)
    before = run.server.params.clone()
    run.server.algorithm.flush(0.1)
    assert torch.equal(run.server.params, before)


def test_it_converges_where_one_worker_is_slow() -> None:
    run = begin("ringleader", num_workers=4, tickets=800, lr=0.2)
    while run.outstanding:
        slow = next((reply for reply in run.outstanding.values() if reply.worker == 3), None)
        others = [reply for reply in run.outstanding.values() if reply.worker != 3]
        run.push(slow if slow is not None and (len(run.pushes) % 10 == 0 or not others) else others[0])
    assert PROBLEM.distance(run.server.params) < 1e-2
