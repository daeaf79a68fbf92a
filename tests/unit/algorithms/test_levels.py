"""Algorithms with two levels, HALoS and HierMo: torch.optim, plain loops and each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ormo_rpc.algorithms.delayed_nesterov import DelayedNesterov
from ormo_rpc.messages import Reply
from ormo_rpc.server.parameter_server import Status
from tests.support.quadratic import BETA, PROBLEM, D, begin, close, torch_sgd
from tests.support.schedule import Schedule, pushed, schedules

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


def test_a_loaded_state_closes_the_global_round_though_no_push_comes_between() -> None:
    options: dict[str, Any] = {"num_workers": 1, "tickets": 20, "region_workers": 1, "global_period": 2}
    run, loaded = begin("halos", **options), begin("halos", **options)
    run.follow([("push", 0)] * 3)
    loaded.server.load_state_dict(run.server.state_dict())
    before = loaded.server.params.clone()
    for server in (run.server, loaded.server):
        server.leave(0)
        server.finish()
    close(loaded.server.params, run.server.params)
    assert not torch.equal(loaded.server.params, before)


def nesterov(x: Tensor, y: Tensor, steps: int, lr: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Take steps ``y' = x - eta g; x = y' + gamma (y' - y)`` on the quadratic."""
    for _ in range(steps):
        ahead = x - lr * PROBLEM.gradient_at(x)
        x, y = ahead + gamma * (ahead - y), ahead
    return x, y


@pytest.mark.parametrize("pi", [1, 3])
@pytest.mark.parametrize("tau", [1, 4])
def test_hiermo_with_one_worker_is_nesterov_momentum_of_torch(tau: int, pi: int) -> None:
    run = begin("hiermo", num_workers=1, tickets=24, lr=0.05, local_steps=tau, edge_rounds=pi, edge_momentum=0.0)
    path = torch_sgd(run.server.params, 24 * tau, lr=0.05, nesterov=True)
    for number, _ in enumerate(run.steps([]), start=1):
        if number % pi == 0:
            close(run.server.params, path[number * tau])


@pytest.mark.parametrize(("K", "R"), [(4, 2), (5, 2), (3, 3), (4, 1)])
@given(schedule=schedules())
def test_hiermo_without_local_steps_is_nesterov_momentum_on_the_mean(K: int, R: int, schedule: Schedule) -> None:
    # Each worker has a shift of its own in the gradient, so the mean matters; edges of unequal size count by their workers.
    lr, shifts = 0.05, torch.randn(K, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def push(reply: Reply) -> Tensor:
        return pushed(run.server.algorithm, lambda x: PROBLEM.gradient_at(x) + shifts[reply.worker])(reply)

    options: dict[str, Any] = {"regions": R, "local_steps": 1, "edge_rounds": 1, "edge_momentum": 0.0}
    run = begin("hiermo", num_workers=K, tickets=6 * K, lr=lr, gradient=push, **options)
    parameter = nn.Parameter(run.server.params.clone())
    optimizer = torch.optim.SGD([parameter], lr=lr, momentum=BETA, nesterov=True)
    for number, _ in enumerate(run.steps(schedule), start=1):
        if number % K == 0:
            parameter.grad = PROBLEM.gradient_at(parameter.detach()) + shifts.mean(0)
            optimizer.step()
            close(run.server.params, parameter.detach())


@pytest.mark.parametrize("pi", [1, 3])
@given(schedule=schedules())
def test_hiermo_without_momentum_is_hierarchical_averaging(pi: int, schedule: Schedule) -> None:
    K, R, tau, lr = 4, 2, 3, 0.05
    matrices = [PROBLEM.matrix * (1 + worker / 2) for worker in range(K)]

    def push(reply: Reply) -> Tensor:
        return pushed(run.server.algorithm, lambda x: matrices[reply.worker] @ x)(reply)

    options: dict[str, Any] = {"local_steps": tau, "edge_rounds": pi, "edge_momentum": 0.0, "momentum": 0.0}
    run = begin("hiermo", num_workers=K, tickets=4 * K * pi, lr=lr, gradient=push, **options)
    x = run.server.params.clone()
    for number, _ in enumerate(run.steps(schedule), start=1):
        if number % (K * pi) == 0:
            edges = list[Tensor]()
            for e in range(R):
                edge = x
                for _ in range(pi):
                    # The quadratics are linear, so tau steps are a power of a matrix.
                    ends = [
                        torch.linalg.matrix_power(torch.eye(D, dtype=torch.float64) - lr * matrices[worker], tau) @ edge
                        for worker in range(e, K, R)
                    ]
                    edge = torch.stack(ends).mean(0)
                edges.append(edge)
            x = torch.stack(edges).mean(0)
            close(run.server.params, x)


def test_an_edge_goes_on_by_its_own_momentum_after_its_round() -> None:
    # tau = 2, pi = 2, one worker: X = Y' + gamma_a (Y' - Y), and the worker goes on from (X, y_e).
    lr, gamma, gamma_a = 0.05, 0.6, 0.3
    options: dict[str, Any] = {"local_steps": 2, "edge_rounds": 2, "edge_momentum": gamma_a, "momentum": gamma}
    run = begin("hiermo", num_workers=1, tickets=12, lr=lr, **options)
    x = y = mean = run.server.params.clone()
    for number, _ in enumerate(run.steps([]), start=1):
        end, y = nesterov(x, y, 2, lr, gamma)
        x, mean = end + gamma_a * (end - mean), end
        if number % 2 == 0:
            close(run.server.params, x)


def test_edges_do_not_wait_for_one_another_between_two_rounds_of_the_cloud() -> None:
    run = begin("hiermo", num_workers=4, tickets=40, edge_rounds=2)  # edge 0: workers 0 and 2, edge 1: workers 1 and 3

    def push(worker: int) -> list[int]:
        step = run.push(next(reply for reply in run.outstanding.values() if reply.worker == worker))
        return sorted(reply.worker for reply in step.replies)

    assert [push(0), push(2)] == [[], [0, 2]]
    assert [push(2), push(0)] == [[], []]  # two rounds done: edge 0 waits for the cloud
    assert [push(1), push(3), push(3), push(1)] == [[], [1, 3], [], [0, 1, 2, 3]]


def test_a_worker_that_joins_an_edge_which_waits_for_the_cloud_begins_at_the_average() -> None:
    targets = [torch.zeros(D, dtype=torch.float64), torch.ones(D, dtype=torch.float64)]
    options: dict[str, Any] = {"local_steps": 1, "edge_rounds": 1, "edge_momentum": 0.0, "momentum": 0.0, "lr": 0.5}

    def push(reply: Reply) -> Tensor:
        return pushed(run.server.algorithm, lambda x: x - targets[reply.worker % 2])(reply)

    run = begin("hiermo", num_workers=2, tickets=20, regions=2, gradient=push, **options)
    first, second = run.outstanding.values()
    assert run.push(first).replies == ()
    assert run.join(2).replies == ()
    average = run.server.params / 2 + 0.25  # half of the way to 1/2, the mean of the targets
    assert sorted(reply.worker for reply in run.push(second).replies) == [0, 1, 2]
    close(run.server.params, average)
    for reply in list(run.outstanding.values()):
        run.push(reply)
    close(run.server.params, average / 2 + 0.5 / 3)  # two workers towards 0, one towards 1


@given(schedule=schedules(changes=True), num_workers=st.integers(1, 6), regions=st.integers(1, 4), pi=st.integers(1, 3))
def test_no_edge_waits_for_workers_that_leave_join_or_fail(schedule: Schedule, num_workers: int, regions: int, pi: int) -> None:
    # Every third push is not finite: its ticket goes to another worker, though all others may be held.
    run = begin("hiermo", num_workers=num_workers, tickets=30, regions=regions, edge_rounds=pi, record=lambda _: None)
    work = run.gradient
    refused = set[int]()

    def push(reply: Reply) -> Tensor:
        assert reply.ticket is not None
        if reply.ticket % 3 == 0 and reply.ticket not in refused:
            refused.add(reply.ticket)
            return work(reply) * float("nan")
        return work(reply)

    run.gradient = push
    run.finish(schedule)
    assert (run.server.status, run.server.iteration) == (Status.completed, 30)
    assert run.stopped == run.members
    assert run.server.algorithm.held() == []
