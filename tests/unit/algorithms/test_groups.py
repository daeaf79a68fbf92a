"""Parameter groups: those of torch.optim, on whichever side they are applied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ormo_rpc.algorithms.groups import Group
from ormo_rpc.messages import Push, Reply
from ormo_rpc.options import find
from ormo_rpc.server.build import build_server
from ormo_rpc.worker.regularise import regularise
from tests.support.contract import DIMENSION, ROWS, SCHEDULER_OPTIONS, Case, cases
from tests.support.contract_row import Row
from tests.support.schedule import Run, normal, pushed

GROUPS = (
    Group(start=0, stop=3, weight_decay=0.1, lr_factor=0.5),
    Group(start=3, stop=5, weight_decay=0.0, lr_factor=1.0),
    Group(start=5, stop=9, weight_decay=0.3, lr_factor=2.0),
    Group(start=9, stop=10, weight_decay=0.1, lr_factor=0.0),
)
"""Factors are powers of two, so that it does not matter to the bits what they multiply first."""
EPSILON_COUNTS = {"gap_aware": 1e-5}
"""Algorithms that add a constant to a size of the gradient, and how far that may show."""


def rate(iteration: int) -> float:
    return (0.1, 0.1, 0.03, 0.0, 0.07)[iteration % 5]


def gradient_at(params: Tensor, ticket: int) -> Tensor:
    return params * torch.linspace(0.1, 1.0, 10, dtype=params.dtype) + normal(10, 0, ticket).to(params.dtype)


def torch_groups(params: Tensor) -> list[dict[str, Any]]:
    """Parameters that are the ranges of a vector, each in a group of its own."""
    return [
        {
            "params": [nn.Parameter(group.of(params).clone())],
            "weight_decay": group.weight_decay,
            "lr_factor": group.lr_factor,
        }
        for group in GROUPS
    ]


def values(optimizer: torch.optim.Optimizer) -> Tensor:
    return torch.cat([group["params"][0].detach() for group in optimizer.param_groups])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("algorithm", ["asgd", "dana"])
def test_one_worker_is_torch_sgd_with_groups_to_the_bit(algorithm: str, dtype: torch.dtype) -> None:
    momentum = 0.0 if algorithm == "asgd" else 0.9
    server = build_server(
        algorithm=algorithm, params=normal(10, 1, 0).to(dtype), num_workers=1, lr=rate, momentum=momentum, total_tickets=25
    )
    sgd = torch.optim.SGD(torch_groups(server.params), lr=1.0, momentum=momentum)
    (reply,) = server.start()
    while reply.ticket is not None:
        for group, part in zip(sgd.param_groups, gradient_at(values(sgd), reply.ticket).split([3, 2, 4, 1]), strict=True):
            group["lr"] = group["lr_factor"] * rate(reply.ticket)
            group["params"][0].grad = part.clone()
        at_worker = values(sgd) if algorithm == "dana" else reply.params  # dana's workers work at a look-ahead
        grad = gradient_at(at_worker, reply.ticket)
        regularise(grad, at_worker, groups=GROUPS)
        (reply,) = server.receive(Push(worker=0, ticket=reply.ticket, stamp=reply.stamp, grad=grad))
        sgd.step()
        if algorithm == "asgd":
            assert torch.equal(server.params, values(sgd))
        else:
            torch.testing.assert_close(server.params, values(sgd), rtol=0, atol=1e-6 if dtype is torch.float32 else 1e-14)


def test_the_whole_gradient_is_clipped_before_it_decays() -> None:
    params, grad = normal(10, 1, 0), normal(10, 1, 1)
    parameters = torch_groups(params)
    for group, part in zip(parameters, grad.split([3, 2, 4, 1]), strict=True):
        group["params"][0].grad = part.clone()
        group["lr"] = group["lr_factor"]
    assert nn.utils.clip_grad_norm_([group["params"][0] for group in parameters], 0.5) > 0.5
    sgd = torch.optim.SGD(parameters, lr=1.0)
    sgd.step()
    regularise(grad, params, clip_norm=0.5, groups=GROUPS)
    # torch divides by the norm + 1e-6.
    torch.testing.assert_close(params - grad, values(sgd), rtol=0, atol=1e-6)


def scaled(gradient: Callable[[Reply], Tensor], factor: float) -> Callable[[Reply], Tensor]:
    return lambda reply: factor * gradient(reply)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@given(case=cases(), factor=st.sampled_from([0.0, 0.25, 3.0]))
def test_a_factor_of_the_gradient_is_one_of_the_learning_rate(row: Row, case: Case, factor: float) -> None:
    algorithm = find("algorithm", row.name)
    if algorithm.DECAYS_ITSELF or algorithm.REFUSES_LR_FACTORS:
        return
    first, second = ends(row, case, grad_factor=factor), ends(row, case, lr_factor=factor)
    tolerance = EPSILON_COUNTS.get(row.name, 1e-13)
    torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance)


def test_it_is_none_where_factors_are_refused() -> None:
    # So the test above can fail.
    row = next(row for row in ROWS if row.name == "dc_asgd")
    case = Case(variant=0, num_workers=3, tickets=20, momentum=0.9, lr="constant", seed=0, schedule=[])
    first, second = (ends(row, case, adaptive=False, **{key: 3.0}) for key in ("grad_factor", "lr_factor"))
    assert (first - second).abs().max() > 1e-3


def ends(row: Row, case: Case, *, grad_factor: float = 1.0, lr_factor: float = 1.0, **options: Any) -> Tensor:
    """The parameters at the end of a run whose gradients depend on their tickets alone."""
    scheduler = row.schedulers[case.variant % len(row.schedulers)]
    server = build_server(
        algorithm=row.name,
        scheduler=scheduler,
        params=case.start(),
        num_workers=case.num_workers,
        lr=lambda t: lr_factor * (0.1, 0.02, 0.05)[t % 3],
        momentum=case.momentum,
        total_tickets=case.tickets,
        **SCHEDULER_OPTIONS.get(scheduler, {}),
        **options,
    )

    def push(reply: Reply) -> Tensor:
        ticket = reply.ticket or 0
        return pushed(server.algorithm, lambda _: grad_factor * normal(DIMENSION, case.seed, ticket))(reply)

    run = Run(server=server, gradient=push, num_workers=case.num_workers).start()
    return run.finish(case.schedule).server.params


def test_groups_are_refused_where_the_workers_decay() -> None:
    with pytest.raises(ValueError, match=r"^groups: got 4, expected None with asgd: weight decay .* a worker's gradient$"):
        build_server(algorithm="asgd", params=torch.zeros(10), num_workers=1, groups=GROUPS)


def test_the_norm_of_millions_of_values_is_not_that_of_their_rounded_sum() -> None:
    grad = torch.full((6_000_000,), 0.01)
    regularise(grad, torch.empty(0), clip_norm=1.0)
    assert torch.linalg.vector_norm(grad, dtype=torch.float64).item() == pytest.approx(1.0, rel=1e-4)
