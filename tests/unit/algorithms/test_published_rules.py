"""The identities of the peers: each against another form of the same method, torch.optim, or numbers made by hand."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ormo_rpc.algorithms.base import PullContext, PushContext
from ormo_rpc.errors import StaleSession
from ormo_rpc.messages import Reply
from ormo_rpc.options import find
from ormo_rpc.server.build import build_server
from ormo_rpc.server.parameter_server import ParameterServer
from tests.support.reference import heavy_ball
from tests.support.schedule import Quadratic, Run, Schedule, noise, schedules

D = 5
BETA = 0.9
LR = 0.05


def begin(
    algorithm: str,
    *,
    num_workers: int,
    gradient: Callable[[Reply], Tensor] | None = None,
    lr: float | Callable[[int], float] = LR,
    **options: Any,
) -> Run[ParameterServer]:
    server = build_server(
        algorithm=algorithm,
        params=torch.linspace(-1, 1, D, dtype=torch.float64),
        num_workers=num_workers,
        lr=lr,
        momentum=BETA,
        total_tickets=30,
        **options,
    )
    return Run(server=server, gradient=gradient or noise(D), num_workers=num_workers).start()


def close(got: Tensor, expected: Tensor) -> None:
    """Equal to rounding: values are of the size of 10, a run has 30 steps: 1e-13 is some hundred roundings."""
    torch.testing.assert_close(got, expected, rtol=0.0, atol=1e-13)


def decay(t: int) -> float:
    return LR / (1 + t)


# ------------------------------------------------------------------------------------------------------------------ shifted


@given(workers=st.integers(1, 5), schedule=schedules())
def test_shifted_momentum_is_that_of_the_stamp(workers: int, schedule: Schedule) -> None:
    run = begin("shifted", num_workers=workers, gradient=Quadratic(D, smallest=0.1).gradient, lr=decay)
    w = run.server.params.clone()
    v = [torch.zeros_like(w)]  # v[i] is that of index i: before iteration i
    for step in run.steps(schedule):
        assert step.push is not None
        t = len(v) - 1
        v.append(BETA * v[step.push.stamp] + decay(t) * step.push.grad)  # t - tau = i
        w = w - v[-1]
        close(run.server.params, w)


# --------------------------------------------------------------------------------------------------------------------- dana


@given(workers=st.integers(1, 5), schedule=schedules())
def test_dana_equals_its_form_with_momentum_on_the_workers(workers: int, schedule: Schedule) -> None:
    # DANA-Slim: worker k does v_k <- beta v_k + g and sends beta v_k + g; the server does theta <- theta - eta (what was sent).
    run = begin("dana", num_workers=workers, gradient=Quadratic(D, smallest=0.1).gradient)
    theta = run.server.params.clone()
    v = [torch.zeros_like(theta) for _ in range(workers)]
    for step in run.steps(schedule):
        assert step.push is not None
        v[step.worker] = BETA * v[step.worker] + step.push.grad
        theta = theta - LR * (BETA * v[step.worker] + step.push.grad)
        for reply in step.replies:
            if reply.ticket is not None:  # a worker that is told to stop gets w itself
                close(reply.params, theta)
    close(run.server.params, theta + LR * BETA * sum(v, torch.zeros_like(theta)))


@pytest.mark.parametrize(("name", "expected"), [("dana", 0.9 * 0.1 * 2), ("shifted", 0.0)])
def test_the_momentum_of_a_worker_that_left_is_dropped(name: str, expected: float) -> None:
    # Both workers push a gradient of 2 from w = 0, eta = 0.1: w = -0.4; v_0 = v_1 = 2 (dana). Without worker 1, dana sends
    # w - eta beta v_0 = -0.4 - 0.1 * 0.9 * 2, and shifted w. Worker 1 comes back, and its gradient of 0 finds no momentum.
    server = build_server(
        algorithm=name, params=torch.zeros(1, dtype=torch.float64), num_workers=2, lr=0.1, momentum=BETA, total_tickets=9
    )
    grads = {0: 2.0, 1: 2.0}
    run = Run(
        server=server,
        gradient=lambda reply: torch.tensor([grads.get(reply.ticket or 0, 0.0)], dtype=torch.float64),
        num_workers=2,
    ).start()
    for reply in list(run.outstanding.values()):
        run.push(reply)
    close(server.params, torch.tensor([-0.4], dtype=torch.float64))
    run.leave(1)
    sent = server.algorithm.outgoing(PullContext(worker=0, concurrency=1, lr=0.1))
    close(sent, torch.tensor([-0.4 - expected], dtype=torch.float64))
    run.join(1)
    run.push(next(reply for reply in run.outstanding.values() if reply.worker == 1))
    close(server.params, torch.tensor([-0.4], dtype=torch.float64))


# ------------------------------------------------------------------------------------------------------------------- smega2


@pytest.mark.parametrize("algorithm", ["smega2", "dana"])
def test_with_one_worker_the_estimate_is_the_parameter_of_torchs_nesterov(algorithm: str) -> None:
    problem = Quadratic(D, smallest=0.1)
    run = begin(algorithm, num_workers=1, gradient=problem.gradient)
    start = run.server.params.clone()
    p = torch.nn.Parameter(start.clone())
    sgd = torch.optim.SGD([p], lr=LR, momentum=BETA, nesterov=True)
    sums = list[Tensor]()
    for reply in [reply for step in run.history for reply in step.replies]:
        close(reply.params, p.detach())
    for step in run.steps([]):
        assert step.push is not None
        sums.append(LR * step.push.grad)
        close(run.server.params, heavy_ball(start, sums, BETA)[0])  # w itself is heavy ball on gradients taken ahead
        p.grad = problem.matrix @ (p.detach() - problem.target)
        sgd.step()
        for reply in step.replies:
            if reply.ticket is not None:
                close(reply.params, p.detach())


@given(workers=st.integers(1, 5), schedule=schedules(changes=True))
def test_smega2_sends_the_parameters_after_k_more_gradients_of_zero(workers: int, schedule: Schedule) -> None:
    run = begin("smega2", num_workers=workers, lr=decay)
    server = run.server
    for _ in run.steps(schedule):
        K, lr = server.concurrency, decay(server.iteration)
        algorithm = copy.deepcopy(server.algorithm)
        sent = algorithm.outgoing(PullContext(worker=0, concurrency=K, lr=lr))
        context = PushContext(worker=0, ticket=0, iteration=0, stamp=0, bucket=0, newest_bucket=0, concurrency=K, lr=lr)
        for _ in range(K):
            algorithm.step(torch.zeros(D, dtype=torch.float64), lr, context)
        close(sent, algorithm.params)


@given(workers=st.integers(2, 5), schedule=schedules())
def test_smega2_flush_closes_the_last_round_once_and_keeps_the_parameters(workers: int, schedule: Schedule) -> None:
    server = begin("smega2", num_workers=workers).finish(schedule).server
    params, state = server.params.clone(), copy.deepcopy(server.algorithm.state_dict())
    assert state["count"] == 0
    server.algorithm.flush(LR)
    assert torch.equal(server.params, params)
    assert all(
        torch.equal(torch.as_tensor(value), torch.as_tensor(state[name]))
        for name, value in server.algorithm.state_dict().items()
    )


# -------------------------------------------------------------------------------------------------------------- delay-aware


def test_staleness_aware_divides_by_the_delay() -> None:
    # Three workers, all gradients 1, eta = 0.6: worker 0 has tau = 0, 0, then worker 1 of stamp 0 has tau = 2, worker 2 has 3.
    # Steps: 0.6 / max(0, 1), 0.6 / max(0, 1), 0.6 / 2, 0.6 / 3; then worker 0, of stamp 2, has tau = 4 - 2: 0.6 / 2.
    server = build_server(
        algorithm="staleness_aware", params=torch.zeros(1, dtype=torch.float64), num_workers=3, lr=0.6, total_tickets=9
    )
    run = Run(server=server, gradient=lambda _: torch.ones(1, dtype=torch.float64), num_workers=3).start()
    walked = 0.0
    for worker, length in ((0, 0.6), (0, 0.6), (1, 0.3), (2, 0.2), (0, 0.3)):
        run.push(next(reply for reply in run.outstanding.values() if reply.worker == worker))
        walked += length
        close(server.params, torch.tensor([-walked], dtype=torch.float64))


def test_dc_asgd_gives_numbers_worked_out_by_hand() -> None:
    # eta = 0.1, gradients 3. Worker 0: w = -0.3. Worker 1 was sent 0: g = 3 + lambda * 9 * (-0.3 - 0).
    # Constant, lambda = 0.04: 3 - 0.108 = 2.892, w = -0.3 - 0.2892. Adaptive, lambda = 2: MS = 0.45, then
    # 0.4275 + 0.45 = 0.8775, g = 3 - 5.4 / sqrt(0.8775 + 1e-7).
    for adaptive, expected in ((False, -0.5892), (True, -0.6 + 0.54 / (0.8775 + 1e-7) ** 0.5)):
        server = build_server(
            algorithm="dc_asgd",
            params=torch.zeros(1, dtype=torch.float64),
            num_workers=2,
            lr=0.1,
            total_tickets=9,
            adaptive=adaptive,
        )
        run = Run(server=server, gradient=lambda _: torch.full((1,), 3.0, dtype=torch.float64), num_workers=2).start()
        for reply in list(run.outstanding.values()):
            run.push(reply)
        close(server.params, torch.tensor([expected], dtype=torch.float64))


@pytest.mark.parametrize(
    ("lr", "grad", "penalty"),
    [
        (0.1, 1.0, 2.0),
        (1e-3, 1e-5, 1.999),  # 1 + 1 / (1 + 1e-8 / 1e-5)
        (1e-2, 1e-8, 1.5),  # the gradient is as small as the 1e-8 that is added to it
        (1e3, 1e-12, 1.0001),  # far smaller, whatever the learning rate
    ],
)
def test_gap_aware_gives_numbers_worked_out_by_hand(lr: float, grad: float, penalty: float) -> None:
    # beta = 0.9, gradients g. Worker 0: v = g, w = -eta g, sqrt(MS / bias) = g, so a usual step is C = eta (g + 1e-8). Worker 1
    # was sent 0, a gap of eta g: penalty 1 + g / (g + 1e-8) at any eta, v = 0.9 g + g / penalty, w = -eta g - eta v.
    server = build_server(
        algorithm="gap_aware", params=torch.zeros(1, dtype=torch.float64), num_workers=2, lr=lr, momentum=BETA, total_tickets=9
    )
    run = Run(server=server, gradient=lambda _: torch.full((1,), grad, dtype=torch.float64), num_workers=2).start()
    for reply in list(run.outstanding.values()):
        run.push(reply)
    exact = 1 + grad / (grad + 1e-8)
    assert exact == pytest.approx(penalty, abs=1e-5)
    expected = torch.tensor([-lr * grad * (1 + 0.9 + 1 / exact)], dtype=torch.float64)
    torch.testing.assert_close(server.params, expected, rtol=1e-14, atol=0)


def test_gap_aware_stays_finite_while_the_learning_rate_is_zero() -> None:
    # eta = 0, 0, 0.1, 0.1 (a warm-up from 0), beta = 0.9, gradients 1, one worker: no gap, v = 1, 1.9, 2.71, 3.439.
    run = begin("gap_aware", num_workers=1, gradient=lambda _: torch.ones(D, dtype=torch.float64), lr=lambda t: 0.1 * (t > 1))
    start = run.server.params.clone()
    for moved in (0.0, 0.0, 0.271, 0.6149):
        run.push(next(iter(run.outstanding.values())))
        close(run.server.params, start - moved)


def test_gap_aware_without_gaps_is_naive() -> None:
    # One worker always has the newest parameters; with a constant learning rate v and u = eta v are the same momentum.
    gradient = Quadratic(D, smallest=0.1).gradient
    run, other = (begin(name, num_workers=1, gradient=gradient).finish() for name in ("gap_aware", "naive"))
    for (params, _), (expected, _) in zip(run.issued, other.issued, strict=True):
        close(params, expected)


@pytest.mark.parametrize("algorithm", ["dc_asgd", "gap_aware"])
def test_a_worker_whose_sent_parameters_the_server_has_lost_must_rejoin(algorithm: str) -> None:
    run = begin(algorithm, num_workers=2)
    fresh = begin(algorithm, num_workers=2).server
    fresh.load_state_dict(run.server.state_dict())
    copied = run.fork(fresh)
    reply = next(iter(copied.outstanding.values()))
    with pytest.raises(
        StaleSession, match=r"^push of worker 0: what it was sent was lost when the server's state was loaded; rejoin$"
    ):
        copied.push(reply)
    copied.restart()
    copied.finish()
    assert fresh.iteration == 30


# ----------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("scheduler", ["sync", "partial", "ssp"])
@pytest.mark.parametrize("algorithm", ["rennala", "ringmaster"])
def test_an_algorithm_that_needs_immediate_replies_refuses_schedulers_that_hold_workers_back(
    algorithm: str, scheduler: str
) -> None:
    reason = find("algorithm", algorithm).NEEDS_IMMEDIATE_REPLIES
    message = f"scheduler: got '{scheduler}', which {algorithm} does not run under: {reason}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        begin(algorithm, num_workers=2, scheduler=scheduler)


@pytest.mark.parametrize("scheduler", ["sync", "partial"])
def test_staleness_aware_refuses_barriers(scheduler: str) -> None:
    message = rf"^scheduler: got '{scheduler}', which staleness_aware .* the delay says nothing; use async or ssp$"
    with pytest.raises(ValueError, match=message):
        begin("staleness_aware", num_workers=2, scheduler=scheduler)


def test_a_negative_compensation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^algorithm\.compensation: got -1\.0, expected a finite number >= 0$"):
        begin("dc_asgd", num_workers=2, compensation=-1)
