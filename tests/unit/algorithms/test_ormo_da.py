"""Delay-adaptive learning rates, alone and in ordered momentum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ormo_rpc.algorithms._delay_adaptive import DelayRule
from ormo_rpc.algorithms.base import PushContext
from ormo_rpc.server.events import Kind
from tests.support.ormo import BETA, D, begin, close, u_of
from tests.support.schedule import Schedule, answer, schedules


def context(delay: int, *, concurrency: int = 3, lr: float = 0.5) -> PushContext:
    return PushContext(
        worker=0,
        ticket=0,
        iteration=100,
        stamp=100 - delay,
        bucket=0,
        newest_bucket=0,
        concurrency=concurrency,
        lr=lr,
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # K = 3, so R = 2K = 6; eta = 0.5. At 12: 0.5 * 6 / 12 = 0.25, at 24: 0.125.
        ({}, {0: 0.5, 5: 0.5, 6: 0.5, 7: 0.5 * 6 / 7, 12: 0.25, 24: 0.125}),
        # R = 4: at 5: 0.5 * 4 / 5 = 0.4; at 8: 0.25.
        ({"threshold": 4}, {3: 0.5, 4: 0.5, 5: 0.4, 8: 0.25}),
        # L = 1/32: 1 / (4 L tau) = 8 / tau; at 7: 8/7 > 0.5, so 0.5; at 16: 0.5, at 32: 0.25.
        ({"smoothness": 1 / 32}, {6: 0.5, 7: 0.5, 16: 0.5, 32: 0.25}),
        # L = 1/4: 1 / tau, already smaller than 0.5 past the threshold: at 8: 0.125.
        ({"smoothness": 0.25}, {5: 0.5, 6: 0.5, 8: 0.125}),
        # eta K / max(K, tau), so its threshold is K = 3: at 4: 0.5 * 3 / 4 = 0.375; at 6: 0.25.
        ({"rule": DelayRule.mishchenko}, {2: 0.5, 3: 0.5, 4: 0.375, 6: 0.25}),
        # eta / tau past R = K = 3, a jump: at 4: 0.125; at 8: 0.0625.
        ({"rule": DelayRule.koloskova}, {2: 0.5, 3: 0.5, 4: 0.125, 8: 0.0625, 10: 0.05}),
        ({"rule": DelayRule.koloskova, "threshold": 1}, {1: 0.5, 2: 0.25}),
        ({"rule": DelayRule.drop}, {2: 0.5, 3: 0.5}),
    ],
    ids=str,
)
def test_the_learning_rate_follows_the_delay(options: dict[str, Any], expected: dict[int, float]) -> None:
    algorithm = begin(num_workers=3, tickets=None, algorithm="ormo_da", **options).run.server.algorithm
    got = {delay: algorithm.learning_rate(context(delay)) for delay in expected}
    assert got == pytest.approx(expected, rel=1e-15, abs=0)
    assert all(algorithm.accepts(context(delay)) for delay in expected)


@pytest.mark.parametrize("algorithm", ["ormo_da", "asgd_da"])
@pytest.mark.parametrize(("options", "limit"), [({}, 3), ({"threshold": 6}, 6), ({"threshold": 0}, 0)], ids=str)
def test_drop_discards_gradients_past_the_concurrency_or_the_given_threshold(
    algorithm: str, options: dict[str, Any], limit: int
) -> None:
    server = begin(num_workers=3, tickets=None, algorithm=algorithm, rule=DelayRule.drop, **options).run.server
    accepted = [server.algorithm.accepts(context(delay)) for delay in (limit, limit + 1, 50)]
    assert accepted == [True, False, False]


def test_the_threshold_of_koloskova_follows_the_concurrency() -> None:
    # K = 8: up to a delay of 8 eta = 0.5; then 0.5 / 9.
    algorithm = begin(num_workers=3, tickets=None, algorithm="asgd_da", rule=DelayRule.koloskova).run.server.algorithm
    rates = [algorithm.learning_rate(context(delay, concurrency=8)) for delay in (7, 8, 9)]
    assert rates == pytest.approx([0.5, 0.5, 0.5 / 9], rel=1e-15, abs=0)


def test_the_ticket_of_a_dropped_gradient_is_reissued_with_fresh_parameters() -> None:
    # K = 2, threshold 1. Worker 0 pushes twice: t = 2. Worker 1's gradient of stamp 0 then has the delay 2 > 1.
    trial = begin(num_workers=2, tickets=6, algorithm="ormo_da", rule=DelayRule.drop, threshold=1)
    run = trial.run
    late = run.outstanding[1, 1]
    run.follow([("push", 0)])
    run.push(run.outstanding[0, 2])
    before = {"params": run.server.params.clone(), "u": u_of(run.server).clone()}
    (reply,) = run.server.receive(answer(late, torch.ones(D, dtype=torch.float64)))
    assert (reply.worker, reply.ticket, reply.stamp) == (1, 1, 2)
    assert torch.equal(run.server.params, before["params"])
    assert torch.equal(u_of(run.server), before["u"])
    assert torch.equal(reply.params, before["params"])
    assert run.server.iteration == 2
    (discarded,) = trial.of(Kind.discard)
    assert (discarded["ticket"], discarded["delay"], discarded["reason"]) == (1, 2, "refused by the algorithm")


@given(workers=st.integers(2, 5), schedule=schedules())
def test_a_late_gradient_moves_ormo_da_by_its_reduced_rate(workers: int, schedule: Schedule) -> None:
    # y = w - beta / (1 - beta) u moves by eta(tau) / (1 - beta) g, with R = 1: eta(tau) = 0.1 min(1, 1 / tau).
    trial = begin(num_workers=workers, tickets=25, algorithm="ormo_da", threshold=1)
    server = trial.run.server

    def y() -> Tensor:
        return server.params - BETA / (1 - BETA) * u_of(server)

    before = y()
    for t, step in enumerate(trial.run.steps(schedule)):
        assert step.push is not None
        rate = 0.1 * min(1.0, 1 / max(1, t - step.push.stamp))
        close(y(), before - rate / (1 - BETA) * step.push.grad)
        before = y()
