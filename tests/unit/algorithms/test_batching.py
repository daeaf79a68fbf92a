"""Algorithms that discard, collect or average gradients: torch.optim and closed forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ormo_rpc.server.events import Event, Kind
from tests.support.quadratic import BETA, PROBLEM, D, begin, close, decaying, torch_sgd
from tests.support.schedule import Schedule, noise, schedules

# ------------------------------------------------------------------------------------------------------ accepted or not


@given(schedule=schedules(), batch=st.integers(1, 5), num_workers=st.integers(1, 5))
def test_rennala_accepts_exactly_the_gradients_of_the_present_version(schedule: Schedule, batch: int, num_workers: int) -> None:
    events: list[Event] = []
    run = begin("rennala", num_workers=num_workers, tickets=17, batch=batch, record=events.append)
    handed = dict.fromkeys(run.outstanding, 0)
    version, applied, discarded = 0, 0, list[int]()
    for step in run.steps(schedule):
        assert step.push is not None
        taken_at = handed.pop((step.worker, step.push.ticket))
        fates = [event.kind for event in events if event.kind in (Kind.apply, Kind.discard)]
        accepted = fates[-1] is Kind.apply
        assert accepted == (taken_at == version)
        if accepted:
            applied += 1
            version = applied // batch
        else:
            discarded.append(step.push.ticket)
        handed.update({(reply.worker, reply.ticket): version for reply in step.replies if reply.ticket is not None})
    assert applied == run.server.iteration == 17
    reissued = [event.data["ticket"] for event in events if event.kind is Kind.reissue]
    assert sorted(reissued) == sorted(discarded), "every discarded ticket comes back, once for each time"


def test_a_discarded_gradient_does_not_advance_the_iteration_of_ringmaster() -> None:
    # R = 2, three workers. Worker 0 pushes stamps 0 and 1 with delays 0 and 0, so t = 2, and the first gradients of the others
    # have the delay 2 each: both are discarded, t stays 2, and both get fresh parameters and a discarded ticket again.
    run = begin("ringmaster", num_workers=3, tickets=20, delay_threshold=2)
    for _ in range(2):
        run.push(next(reply for reply in run.outstanding.values() if reply.worker == 0))
    assert run.server.iteration == 2
    params = run.server.params.clone()
    for worker, again in ((1, 1), (2, 2)):
        step = run.push(next(reply for reply in run.outstanding.values() if reply.worker == worker))
        (fresh,) = step.replies
        assert (run.server.iteration, fresh.stamp, fresh.ticket) == (2, 2, again)
        assert torch.equal(fresh.params, params)
    assert torch.equal(run.server.params, params)


@pytest.mark.parametrize("algorithm", ["rennala", "ringmaster"])
@pytest.mark.parametrize("scheduler", ["sync", "partial", "ssp"])
def test_a_barrier_is_refused_with_the_reason(algorithm: str, scheduler: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^scheduler: got '{scheduler}', which {algorithm} does not run under: .*; use async$"
    ):
        begin(algorithm, num_workers=2, tickets=4, scheduler=scheduler)


# ------------------------------------------------------------------------------------------------------------- buffers


@pytest.mark.parametrize(("algorithm", "option"), [("rennala", "batch"), ("fedbuff", "buffer")])
def test_the_rest_of_a_buffer_is_applied_at_the_end(algorithm: str, option: str) -> None:
    # Ten gradients, B = 4: two steps, and a rest of two that weigh 1/4 each like all others.
    options: dict[str, Any] = {option: 4}
    run = begin(algorithm, num_workers=1, tickets=10, gradient=noise(D), **options).finish()
    total = torch.stack([push.grad for push in run.pushes]).sum(0)
    close(run.server.params, torch.linspace(-1, 1, D, dtype=torch.float64) - 0.1 / 4 * total)


@pytest.mark.parametrize("activation", [0.0, 0.1, 0.25])
def test_delayed_nesterov_closes_its_last_round_at_the_end(activation: float) -> None:
    # Six gradients, N = 4, beta = 1/2. Each acts at once, as g / 4. The fourth makes m_1 = (g_1 + ... + g_4) / 4 and brings
    # (1 - 4c + c) beta m_1; the three before it bring c beta m_0 = 0. The fifth and sixth bring c beta m_1 each, and closing
    # their round (1 - 2c) beta m_2 with m_2 = m_1 / 2 + (g_5 + g_6) / 4.
    run = begin(
        "delayed_nesterov",
        num_workers=1,
        tickets=6,
        momentum=0.5,
        gradient=noise(D),
        period=4,
        activation=activation,
    ).finish()
    g = torch.stack([push.grad for push in run.pushes])
    first = g[:4].sum(0) / 4
    second = first / 2 + g[4:].sum(0) / 4
    c = activation
    moved = g.sum(0) / 4 + ((1 - 3 * c) * first + 2 * c * first + (1 - 2 * c) * second) / 2
    close(run.server.params, torch.linspace(-1, 1, D, dtype=torch.float64) - 0.1 * moved)


@pytest.mark.parametrize("algorithm", ["rennala", "fedbuff", "delayed_nesterov"])
@pytest.mark.parametrize("tickets", [8, 10])
def test_a_second_flush_changes_no_bit(algorithm: str, tickets: int) -> None:
    server = begin(algorithm, num_workers=1, tickets=tickets, gradient=noise(D)).finish().server
    before = server.state_dict()
    server.algorithm.flush(0.1)
    after = server.state_dict()
    assert torch.equal(after["params"], before["params"])
    assert all(
        torch.equal(torch.as_tensor(after["algorithm_state"][k]), torch.as_tensor(v))
        for k, v in before["algorithm_state"].items()
    )


def test_delayed_nesterov_of_period_one_is_nesterov_momentum_of_torch() -> None:
    run = begin("delayed_nesterov", num_workers=1, tickets=40, period=1)
    path = torch_sgd(run.server.params, 40, lr=0.1, nesterov=True)
    for number, _ in enumerate(run.steps([]), start=1):
        close(run.server.params, path[number])


# ------------------------------------------------------------------------------------------------- averages and momenta


def test_pnm_without_momentum_is_sgd() -> None:
    run = begin("pnm", num_workers=1, tickets=30, momentum=0.0, beta2=0.0)
    w = run.server.params.clone()
    for _ in run.steps([]):
        w = w - 0.1 * PROBLEM.gradient_at(w)
        close(run.server.params, w)


def test_a_constant_gradient_moves_pnm_by_eta_over_the_norm_of_its_coefficients() -> None:
    # Both momenta tend to g, so the step to eta ((1 + b) - b) g / sqrt((1 + b)^2 + b^2), with b = 1: eta g / sqrt(5).
    run = begin("pnm", num_workers=2, tickets=400, gradient=lambda _: torch.ones(D, dtype=torch.float64))
    for _, _ in zip(range(399), run.steps([]), strict=False):
        pass
    before = run.server.params.clone()
    run.finish()
    close(before - run.server.params, torch.full((D,), 0.1 / 5**0.5, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("lr", [0.1, decaying])
def test_spa_is_y_of_ordered_momentum_where_one_worker_runs(lr: float | Callable[[int], float]) -> None:
    spa, ormo = (begin(name, num_workers=1, tickets=40, lr=lr) for name in ("spa", "ormo"))
    for _ in zip(spa.steps([]), ormo.steps([]), strict=True):
        w, u = ormo.server.params, ormo.server.algorithm.state_dict()["u"]
        z = spa.server.algorithm.state_dict()["z"]
        assert isinstance(z, Tensor)
        close(spa.server.params, w)
        close(z, w - BETA / (1 - BETA) * u)
