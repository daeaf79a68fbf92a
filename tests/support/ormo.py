"""Runs of ordered momentum on five parameters, for the tests of its identities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ormo_rpc.messages import Reply
from ormo_rpc.server.build import build_server
from ormo_rpc.server.events import Event, Kind
from ormo_rpc.server.parameter_server import ParameterServer
from tests.support.schedule import Run, noise

D = 5
BETA = 0.9


@dataclass
class Trial:
    """A run and its events."""

    run: Run[ParameterServer]
    events: list[Event] = field(default_factory=list[Event])

    def of(self, kind: Kind) -> list[Any]:
        """Return the data of the events of a kind."""
        return [event.data for event in self.events if event.kind is kind]


def begin(
    *,
    num_workers: int,
    tickets: int | None,
    algorithm: str = "ormo",
    scheduler: str = "async",
    momentum: float = BETA,
    lr: float | Callable[[int], float] = 0.1,
    gradient: Callable[[Reply], Tensor] | None = None,
    start: Tensor | None = None,
    **options: Any,
) -> Trial:
    events: list[Event] = []
    server = build_server(
        algorithm=algorithm,
        scheduler=scheduler,
        params=torch.linspace(-1, 1, D, dtype=torch.float64) if start is None else start,
        num_workers=num_workers,
        lr=lr,
        momentum=momentum,
        total_tickets=tickets,
        record=events.append,
        **options,
    )
    run = Run(server=server, gradient=gradient or noise(D), num_workers=num_workers).start()
    return Trial(run, events)


def close(got: Tensor, expected: Tensor) -> None:
    """Assert equality to rounding: 1e-12 is some hundred roundings of values of about 10."""
    torch.testing.assert_close(got, expected, rtol=0.0, atol=1e-12)


def u_of(server: ParameterServer) -> Tensor:
    u = server.algorithm.state_dict()["u"]
    assert isinstance(u, Tensor)
    return u
