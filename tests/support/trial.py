"""A small server under test, with its events and the newest reply of each worker."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ormo_rpc.messages import Push, Reply
from ormo_rpc.server.build import build_server
from ormo_rpc.server.events import Event
from ormo_rpc.server.parameter_server import ParameterServer
from tests.support.schedule import answer

ONE = torch.ones(3, dtype=torch.float64)


@dataclass
class Trial:
    """A server of three parameters, its events, and the newest reply of each worker."""

    server: ParameterServer
    events: list[Event] = field(default_factory=list[Event])
    held: dict[int, Reply] = field(default_factory=dict[int, Reply])

    def note(self, replies: list[Reply]) -> list[Reply]:
        """Remember the newest reply of each worker."""
        self.held.update({reply.worker: reply for reply in replies})
        return replies

    def push(self, worker: int, grad: Tensor = ONE, **changes: Any) -> list[Reply]:
        """Push a gradient for the newest reply of a worker."""
        return self.note(self.server.receive(self.work(worker, grad, **changes)))

    def work(self, worker: int, grad: Tensor = ONE, **changes: Any) -> Push:
        """Return that push without sending it."""
        return replace(answer(self.held[worker], grad), **changes)

    @property
    def kinds(self) -> list[str]:
        """Return the kinds of the events, in order."""
        return [event.kind.value for event in self.events]


def begin(*, num_workers: int = 3, tickets: int | None = 10, start: bool = True, **options: Any) -> Trial:
    events: list[Event] = []
    settings: dict[str, Any] = {"params": torch.zeros(3, dtype=torch.float64), "lr": 0.5, **options}
    server = build_server(num_workers=num_workers, total_tickets=tickets, record=events.append, **settings)
    trial = Trial(server, events)
    if start:
        trial.note(server.start())
    return trial


def brief(replies: list[Reply]) -> list[tuple[int, int | None, int]]:
    """Return worker, ticket and stamp of each reply."""
    return [(reply.worker, reply.ticket, reply.stamp) for reply in replies]


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def receive_or_raise(server: ParameterServer, push: Push) -> None:
    """Raise why a push is rejected, which `receive` would settle, and so change the server."""
    rejected = server.validate(push).rejected
    if rejected is not None:
        raise rejected
    server.receive(push)
