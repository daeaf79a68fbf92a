"""Loops of the user's own on small problems, and what plain PyTorch makes of the same batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from typing_extensions import override

import ormo_rpc
from ormo_rpc.own_loop.loop import JoinedWorker

TICKETS = 12
QUIET = ("logger=none", "logger.progress=false")


def net(seed: int = 0) -> torch.nn.Sequential:
    """A small network with its weights from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


class Normed(torch.nn.Module):
    """A network with a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.norm = torch.nn.BatchNorm1d(3)

    @override
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.norm(self.net(inputs))


def batch(ticket: int, size: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs, shape (B, 4), and class numbers of a ticket."""
    generator = torch.Generator().manual_seed(ticket)
    inputs = torch.randn(size, 4, generator=generator)
    return inputs, (inputs.sum(1) > 0).long()


def loss_of(model: torch.nn.Module, ticket: int) -> torch.Tensor:
    """The loss of a ticket's batch."""
    inputs, targets = batch(ticket)
    return torch.nn.functional.cross_entropy(model(inputs), targets)


def joined(
    model: torch.nn.Module, folder: Path, *overrides: str, tickets: int = TICKETS, lr: float | Callable[[int], float] = 0.1
) -> JoinedWorker:
    """Join a run of this process alone, by SGD without momentum."""
    words = ("algorithm=asgd", *QUIET, *overrides)
    return ormo_rpc.join(model, *words, total_tickets=tickets, lr=lr, run_dir=folder / "run")


def plain(
    model: torch.nn.Module,
    backward: Callable[[torch.nn.Module, int], None],
    tickets: Sequence[int] = range(TICKETS),
    lr: float = 0.1,
) -> torch.nn.Module:
    """Train by plain PyTorch, one step for each ticket."""
    optimizer = torch.optim.SGD(model.parameters(), lr)
    for ticket in tickets:
        optimizer.zero_grad()
        backward(model, ticket)
        optimizer.step()
    return model


def assert_same(model: torch.nn.Module, other: torch.nn.Module) -> None:
    """Compare all parameters and buffers, to rounding."""
    for (name, one), (_, two) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        torch.testing.assert_close(one, two, msg=lambda text, name=name: f"{name}: {text}")


def work_through(worker: JoinedWorker, model: torch.nn.Module, before: Callable[[int], None] = lambda _: None) -> None:
    """Compute and push the gradient of each ticket; ``before`` is called with its number first."""
    for work in worker:
        before(work.ticket)
        loss = loss_of(model, work.ticket)
        loss.backward()
        worker.push(loss)
