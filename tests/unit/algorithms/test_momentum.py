"""Momentum when the learning rate changes: with ``momentum_correction`` all algorithms treat it as torch.optim.SGD does."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ormo_rpc.algorithms._momentum import Momentum, StepMomentum
from ormo_rpc.algorithms.base import Algorithm
from ormo_rpc.messages import Reply
from ormo_rpc.options import find
from ormo_rpc.server.build import build_server
from ormo_rpc.server.parameter_server import ParameterServer
from tests.support.contract import DIMENSION, ROWS, SCHEDULER_OPTIONS, Case, cases
from tests.support.contract_row import Row
from tests.support.schedule import Quadratic, Run, normal, pushed

with_momentum = pytest.mark.parametrize(
    "row", [row for row in ROWS if issubclass(find("algorithm", row.name), Momentum)], ids=lambda row: row.name
)
LOOK_AHEAD = ("dana", "smega2", "ormo_la", "ormo_la_da")
"""Algorithms whose workers do not work at ``w``."""
NOT_PROPORTIONAL = {
    "gap_aware": "compares how far w moved with the largest rate so far",
    "m_sync": "has the rate of a round's last gradient, also where a worker that leaves ends the round",
    "ormo_adamw": "takes the steps of its window again, each at its bucket's rate",
}
"""Algorithms whose step is not the present learning rate times something that no rate changes, and why."""


def each_batch(algorithm: Algorithm, gradient: Callable[[Tensor, int], Tensor]) -> Callable[[Reply], Tensor]:
    """Return the pushes of an algorithm's workers whose gradient depends on the parameters and the batch's number."""

    def push(reply: Reply) -> Tensor:
        batches = itertools.count(100 * (reply.ticket or 0))
        return pushed(algorithm, lambda params: gradient(params, next(batches)))(reply)

    return push


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_algorithm_that_reads_the_momentum_has_the_option(row: Row) -> None:
    ends = set[bytes]()
    for momentum in (0.0, 0.9):
        case = Case(variant=0, num_workers=2, tickets=20, momentum=momentum, lr="constant", seed=0, schedule=[])
        ends.add(case.run(row.name, row.schedulers[0], {}).finish().server.params.numpy().tobytes())
    assert issubclass(find("algorithm", row.name), Momentum) == (len(ends) == 2)


@pytest.mark.parametrize("row", [row for row in ROWS if row.torch_sgd is not None], ids=lambda row: row.name)
@pytest.mark.parametrize("rates", [(0.05,), (0.1, 0.1, 0.02), (0.0, 0.1, 0.0, 0.03, 0.08)], ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_one_worker_is_torch_sgd_when_the_learning_rate_changes(row: Row, rates: tuple[float, ...], beta: float) -> None:
    options: dict[str, Any] = {"momentum_correction": True, **(row.torch_sgd or {})}
    problem, seen = Quadratic(4, smallest=0.1), list[tuple[int, Tensor]]()

    def gradient(params: Tensor, batch: int) -> Tensor:
        grad = problem.gradient_at(params) + normal(4, 0, batch)
        seen.append((batch, grad))
        return grad

    server = build_server(
        algorithm=row.name,
        params=torch.linspace(-1, 1, 4, dtype=torch.float64),
        num_workers=1,
        lr=lambda t: rates[t % len(rates)],
        momentum=beta,
        total_tickets=25,
        **options,
    )
    p = torch.nn.Parameter(server.params.clone())
    sgd = torch.optim.SGD([p], lr=1.0, momentum=beta, nesterov=row.nesterov and beta > 0)
    run = Run(server=server, gradient=each_batch(server.algorithm, gradient), num_workers=1).start()
    for t, _ in enumerate(run.steps([])):
        sgd.param_groups[0]["lr"] = rates[t % len(rates)]
        while seen:
            batch, at_worker = seen.pop(0)
            p.grad = at_worker if row.name in LOOK_AHEAD else problem.gradient_at(p.detach()) + normal(4, 0, batch)
            sgd.step()
        # Values below 100, and 100 steps of a few roundings each.
        torch.testing.assert_close(server.params, p.detach(), rtol=0, atol=1e-12)


@with_momentum
@given(
    case=cases(),
    pick=st.integers(0, 99),
    rates=st.lists(st.sampled_from([0.0, 0.01, 0.03, 0.1]), min_size=1, max_size=8),
)
def test_each_step_is_the_present_rate_times_that_of_a_run_at_rate_1(
    row: Row, pick: int, case: Case, rates: list[float]
) -> None:
    # The gradients depend on the batch alone, so only the rates tell the two runs apart.
    options: dict[str, Any] = {**case.options(row), "momentum_correction": True}
    scheduler = row.schedulers[pick % len(row.schedulers)]
    if row.name in NOT_PROPORTIONAL or "smoothness" in options:
        return
    scheduler = scheduler if scheduler in row.schedulers else row.schedulers[0]
    runs = list[Run[ParameterServer]]()
    for lr in (lambda t: rates[t % len(rates)], lambda _: 1.0):
        server = build_server(
            algorithm=row.name,
            scheduler=scheduler,
            params=torch.zeros(DIMENSION, dtype=torch.float64),
            num_workers=case.num_workers,
            lr=lr,
            momentum=case.momentum,
            total_tickets=case.tickets,
            **SCHEDULER_OPTIONS.get(scheduler, {}),
            **options,
        )
        gradient = each_batch(server.algorithm, lambda _, batch: normal(DIMENSION, case.seed, batch))
        runs.append(Run(server=server, gradient=gradient, num_workers=case.num_workers).start())
    changing, constant = (run.server for run in runs)
    before = [changing.params.clone(), constant.params.clone()]
    largest, t = 0.0, 0
    for _ in zip(*(run.steps(case.schedule) for run in runs), strict=True):
        moved = [server.params - old for server, old in zip((changing, constant), before, strict=True)]
        before = [changing.params.clone(), constant.params.clone()]
        rate, t = rates[t % len(rates)], changing.iteration
        largest = max(largest, float(constant.params.abs().max()), float(changing.params.abs().max()))
        assert (moved[0] - rate * moved[1]).abs().max() <= 1e-13 * (1 + largest)


@with_momentum
def test_only_an_algorithm_whose_momentum_sums_steps_can_be_left_uncorrected(row: Row) -> None:
    case = Case(variant=0, num_workers=2, tickets=20, momentum=0.9, lr="step", seed=0, schedule=[])
    ends = dict[bool | None, Tensor]()
    for value in (None, True, False):
        algorithm = find("algorithm", row.name)
        if value is False and not issubclass(algorithm, StepMomentum):
            message = (
                r"^algorithm\.momentum_correction: got False, expected true or null: "
                rf"the momentum of {row.name} sums gradients, and the present learning rate multiplies it$"
            )
            with pytest.raises(ValueError, match=message):
                algorithm(momentum_correction=value)
            continue
        run = case.run(row.name, "async", {"momentum_correction": value})
        run.gradient = each_batch(run.server.algorithm, lambda _, batch: normal(DIMENSION, 0, batch))
        ends[value] = run.finish().server.params
    sums_steps = False in ends
    assert torch.equal(ends[None], ends[not sums_steps])
    assert torch.equal(ends[None], ends[True]) is not sums_steps
