"""Runs of any algorithm on a quadratic of five parameters, and torch's SGD on the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ormo_rpc.messages import Reply
from ormo_rpc.server.build import build_server
from ormo_rpc.server.events import Event
from ormo_rpc.server.parameter_server import ParameterServer
from tests.support.schedule import Quadratic, Run, pushed

D = 5
BETA = 0.9
PROBLEM = Quadratic(D, smallest=0.1)


def close(got: Tensor, expected: Tensor, atol: float = 1e-13) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def decaying(iteration: int) -> float:
    return 0.1 / (1 + iteration)


def begin(
    algorithm: str,
    *,
    num_workers: int,
    tickets: int,
    scheduler: str = "async",
    lr: float | Callable[[int], float] = 0.1,
    momentum: float = BETA,
    record: Callable[[Event], None] = lambda _: None,
    gradient: Callable[[Reply], Tensor] | None = None,
    **options: Any,
) -> Run[ParameterServer]:
    """Start a run; by default the gradients are those of the quadratic `PROBLEM`."""
    server = build_server(
        algorithm=algorithm,
        scheduler=scheduler,
        params=torch.linspace(-1, 1, D, dtype=torch.float64),
        num_workers=num_workers,
        lr=lr,
        momentum=momentum,
        total_tickets=tickets,
        record=record,
        **options,
    )
    work = pushed(server.algorithm, PROBLEM.gradient_at) if gradient is None else gradient
    return Run(server=server, gradient=work, num_workers=num_workers).start()


def torch_sgd(start: Tensor, steps: int, *, lr: float, nesterov: bool = False) -> list[Tensor]:
    """Return the parameters of ``torch.optim.SGD`` on the quadratic after 0, 1, ..., steps steps."""
    parameter = nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([parameter], lr=lr, momentum=BETA, nesterov=nesterov)
    path = [start.clone()]
    for _ in range(steps):
        parameter.grad = PROBLEM.gradient_at(parameter.detach())
        optimizer.step()
        path.append(parameter.detach().clone())
    return path
