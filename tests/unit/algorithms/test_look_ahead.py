"""Ordered momentum with look-ahead: what a worker is sent."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.ormo import BETA, D, begin, close, u_of
from tests.support.reference import OrMoLA
from tests.support.schedule import Quadratic, Schedule, Step, schedules

RULES = pytest.mark.parametrize("rule", ["ormo_la", "ormo_la_da"])
PROBLEM = Quadratic(D, smallest=0.1)


def sent_in(step: Step) -> list[tuple[int, Tensor]]:
    """Return what each worker is sent; one that is told to stop gets ``w`` itself."""
    return [(reply.worker, reply.params) for reply in step.replies if reply.ticket is not None]


@given(workers=st.integers(1, 5), schedule=schedules(changes=True), beta=st.sampled_from([0.0, 0.5, 0.9]))
def test_a_worker_is_sent_the_parameters_after_the_shifts_until_its_gradient_is_due(
    workers: int, schedule: Schedule, beta: float
) -> None:
    run = begin(algorithm="ormo_la", num_workers=workers, tickets=25, momentum=beta).run
    start = torch.linspace(-1, 1, D, dtype=torch.float64)
    reference = OrMoLA(start, num_workers=workers, lr=lambda _: 0.1, momentum=beta)
    for step in run.steps(schedule):
        for worker, params in sent_in(step):
            close(params, reference.sent(run.history, worker))


@RULES
@pytest.mark.parametrize("beta", [0.5, 0.9])
def test_one_worker_is_torchs_nesterov(rule: str, beta: float) -> None:
    run = begin(algorithm=rule, num_workers=1, tickets=40, momentum=beta, gradient=PROBLEM.gradient).run
    p = run.server.params.clone()
    sgd = torch.optim.SGD([p], lr=0.1, momentum=beta, nesterov=True)
    for step in run.steps([]):
        p.grad = PROBLEM.matrix @ (p - PROBLEM.target)
        sgd.step()
        for _, params in sent_in(step):
            close(params, p)


@RULES
@given(workers=st.integers(1, 6), schedule=schedules())
def test_under_sync_it_is_torchs_nesterov_on_the_sum_of_a_round(rule: str, workers: int, schedule: Schedule) -> None:
    run = begin(
        algorithm=rule, num_workers=workers, tickets=5 * workers, scheduler="sync", lr=0.03, gradient=PROBLEM.gradient
    ).run
    p = run.server.params.clone()
    sgd = torch.optim.SGD([p], lr=0.03, momentum=BETA, nesterov=True)
    rounds = 0
    for step in run.steps(schedule):
        if not step.replies:
            continue
        p.grad = workers * (PROBLEM.matrix @ (p - PROBLEM.target))
        sgd.step()
        rounds += 1
        for _, params in sent_in(step):
            close(params, p)
    assert rounds == 5


def test_a_corrected_look_ahead_is_at_the_rate_of_the_next_step() -> None:
    rates = (0.1, 0.1, 0.02, 0.0, 0.05)
    run = begin(
        algorithm="ormo_la",
        num_workers=1,
        tickets=20,
        lr=lambda t: rates[t % 5],
        gradient=PROBLEM.gradient,
        momentum_correction=True,
    ).run
    p = run.server.params.clone()
    sgd = torch.optim.SGD([p], lr=1.0, momentum=BETA)
    for t, step in enumerate(run.steps([])):
        assert step.push is not None
        sgd.param_groups[0]["lr"] = rates[t % 5]
        p.grad = step.push.grad.clone()
        sgd.step()
        for _, params in sent_in(step):
            close(params, p - rates[(t + 1) % 5] * BETA * sgd.state[p]["momentum_buffer"])


def test_a_slow_worker_looks_further_ahead_than_a_fast_one_and_forgets_it_when_it_leaves() -> None:
    # K = 2; worker 0 pushes 6 times, then worker 1 once, all with a gradient of 1 and eta = 0.1. Indices 1 to 6 are of buckets
    # 1, 1, 2, 2, 3, 3. Nobody else is handed anything while worker 0 computes, so its gradients have e = 0; worker 1, of
    # bucket 0, finds I = 3: e = 3, and is sent w after 4 shifts. When it comes back, it has no past.
    run = begin(algorithm="ormo_la", num_workers=2, tickets=None, gradient=lambda _: torch.ones(D, dtype=torch.float64)).run
    replies = {worker: reply for (worker, _), reply in run.outstanding.items()}
    for _ in range(6):
        step = run.push(replies[0])
        replies[0] = step.replies[0]
    w, u = run.server.params, u_of(run.server)
    close(replies[0].params, w - BETA * u)
    step = run.push(replies[1])
    w, u = run.server.params, u_of(run.server)
    close(step.replies[0].params, w - (BETA + BETA**2 + BETA**3 + BETA**4) * u)
    run.leave(1)
    back = run.join(1).replies[0]
    close(back.params, w - BETA * u)
