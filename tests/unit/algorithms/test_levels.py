"""Algorithms with two levels, HALoS and HierMo: torch.optim, plain loops and each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ormo_rpc.algorithms.delayed_nesterov import DelayedNesterov
from tests.support.quadratic import PROBLEM, D, begin, close
from tests.support.schedule import Schedule, schedules

PASSES_ON: dict[str, Any] = {"global_lr": 1.0, "global_momentum": 0.0, "global_period": 1}
"""A global level that takes over what a region sends."""


def end_of_steps(x: Tensor, steps: int, lr: float) -> Tensor:
    """Take plain steps on the quadratic."""
    for _ in range(steps):
        x = x - lr * PROBLEM.gradient_at(x)
    return x


def of_region(run: Any, name: str, region: int = 0) -> Tensor:
    """Return a live vector of a region."""
    return run.server.algorithm.state_dict()[f"region_{name}/{region}"]


@given(schedule=schedules(changes=True), weight=st.floats(0, 1), exchange=st.integers(1, 6))
def test_merging_changes_nothing_where_one_region_is_passed_on(schedule: Schedule, weight: float, exchange: int) -> None:
    run = begin(
        "halos", num_workers=3, tickets=25, regions=1, exchange=exchange, merge_weight=weight, region_period=3, **PASSES_ON
    )
    alone = DelayedNesterov(period=3)
    alone.init(run.server.params.clone(), 0.9)
    for pushes, push in enumerate((step.push for step in run.steps(schedule) if step.push is not None), start=1):
        if pushes == 25:
            break  # the rounds are closed at the end
        alone.add(push.grad, 0.2 * 3)
        close(of_region(run, "th"), alone.params)
        if pushes % exchange == 0:
            close(run.server.params, alone.params)


@pytest.mark.parametrize("exchange", [1, 2, 4])
@pytest.mark.parametrize("H", [1, 3])
def test_a_region_is_nesterov_momentum_on_the_mean_of_a_round(H: int, exchange: int) -> None:
    # Four workers that start together, so their displacements are alike: a round is one step of torch's on their mean.
    N, lr = 4, 0.05
    options: dict[str, Any] = {**PASSES_ON, "regions": 1, "region_period": N, "exchange": exchange, "region_momentum": 0.8}
    run = begin("halos", num_workers=N, tickets=N * 8, scheduler="sync", lr=lr, local_steps=H, **options)
    parameter = nn.Parameter(run.server.params.clone())
    optimizer = torch.optim.SGD([parameter], lr=0.2 * N, momentum=0.8, nesterov=True)
    for number, _ in enumerate(run.steps([]), start=1):
        if number % N == 0:
            here = parameter.detach().clone()
            parameter.grad = here - end_of_steps(here, H, lr)
            optimizer.step()
            close(run.server.params, parameter.detach())


@pytest.mark.parametrize("schedule", [[], [("push", n) for n in (3, 1, 0, 2, 2, 5, 1)]], ids=["in turn", "out of turn"])
def test_halos_is_the_loop_of_a_server_for_each_region_and_one_for_all(schedule: Schedule) -> None:
    J, a, lr, H, K, R = 3, 0.4, 0.1, 2, 4, 2
    run = begin("halos", num_workers=K, tickets=40, lr=lr, local_steps=H, exchange=J, merge_weight=a, region_period=2)
    w = DelayedNesterov(period=2)
    w.init(run.server.params.clone(), 0.5)
    regions = [DelayedNesterov(period=2) for _ in range(R)]
    for region in regions:
        region.init(run.server.params.clone(), 0.9)
    merged, pushes = [region.params.clone() for region in regions], [0] * R
    at = [regions[worker % R].params.clone() for worker in range(K)]
    for number, step in enumerate(run.steps(schedule), start=1):
        if number == 40:
            break
        r = step.worker % R
        region = regions[r]
        region.add(at[step.worker] - end_of_steps(at[step.worker], H, lr), 0.2 * 2)
        pushes[r] += 1
        if pushes[r] % J == 0:
            w.add(merged[r] - region.params, 0.15 * 2)
            region.params = (1 - a) * region.params + a * w.params
            merged[r] = region.params.clone()
        at[step.worker] = region.params.clone()
        close(run.server.params, w.params)
        for q in range(R):
            close(of_region(run, "th", q), regions[q].params)


def test_what_a_region_has_not_sent_is_sent_at_the_end_though_its_workers_have_left() -> None:
    run = begin("halos", num_workers=2, tickets=8, exchange=100, region_period=100, global_period=1, global_lr=1.0)
    start = run.server.params.clone()
    moved: list[Tensor] = [torch.zeros(D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64)]
    for step in run.steps([("push", 1), ("push", 1), ("leave", 1)]):
        if step.push is not None:
            moved[step.worker] += step.push.grad
    first, second = (0.2 * (push + 0.9 * push) for push in moved)  # the round of a region closes with its momentum
    # and each of the two sent makes a step of Nesterov, m <- m / 2 + sent; w <- w - sent - m / 2.
    close(start - run.server.params, 1.5 * first + 1.5 * second + 0.25 * first)
