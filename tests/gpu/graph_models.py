"""Models for recorded passes, some of which no graph can hold; and pushes to compare."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from typing_extensions import override

from ormo_rpc.messages import Push, Reply
from ormo_rpc.runtimes.job import Job


def dropping(p: float = 0.5) -> nn.Module:
    """A net for digits with a batch norm and two sorts of dropout."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout2d(p),
        nn.Flatten(),
        nn.Linear(512, 32),
        nn.ReLU(),
        nn.Dropout(p),
        nn.Linear(32, 10),
    )


class Net(nn.Module):
    """A small net for digits, with something in its middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 10)
        self.norm = nn.BatchNorm1d(32)

    @override
    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.middle(self.first(images.flatten(1)).relu()))

    def middle(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden)


class StochasticDepth(Net):
    """Python's random numbers decide what is computed."""

    @override
    def middle(self, hidden: Tensor) -> Tensor:
        return hidden + self.layer(hidden).relu() if random.random() < 0.5 else hidden


class Alternating(Net):
    """A number of Python's decides what is computed."""

    calls = 0

    @override
    def middle(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        return hidden + self.layer(hidden).relu() if self.calls % 2 else hidden


class Centring(Net):
    """Changes its inputs in place."""

    @override
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.mul_(2.0).sub_(0.5))


class Masking(Net):
    """Keeps a mask for the newest size of batches."""

    mask = torch.empty(0)

    @override
    def middle(self, hidden: Tensor) -> Tensor:
        if len(self.mask) != len(hidden):
            self.mask = torch.linspace(0.5, 1.5, len(hidden), device=hidden.device)[:, None]
        return self.norm(hidden * self.mask)


class CalledTwice(Net):
    """One batch norm, two calls."""

    @override
    def middle(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden) + self.norm(2 * hidden + 1)


class Spectral(Net):
    """The spectral norm, whose passes change its vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.utils.parametrizations.spectral_norm(nn.Linear(32, 32))

    @override
    def middle(self, hidden: Tensor) -> Tensor:
        return self.layer(hidden)


class Waiting(Net):
    """A number is read from the GPU."""

    @override
    def middle(self, hidden: Tensor) -> Tensor:
        return hidden / max(1.0, hidden.abs().max().item())


class Synchronizing(Net):
    """Waits for the GPU in a way that torch does not notice."""

    @override
    def middle(self, hidden: Tensor) -> Tensor:
        torch.cuda.synchronize()
        return self.norm(hidden)


def replies(job: Job, tickets: Iterable[int], device: torch.device, *, loss_scale: float = 1.0) -> list[Reply]:
    """Replies with parameters that differ from ticket to ticket, on a device."""
    model = job.model()
    params, buffers = model.flat_params(), model.buffers.initial
    return [
        Reply(
            worker=ticket % 3,
            ticket=ticket,
            stamp=ticket,
            params=(params * (1 + 0.01 * ticket)).to(device),
            lr=0.1,
            steps=job.config.algorithm.steps,
            incarnation=0,
            loss_scale=loss_scale,
            buffers=buffers.to(device),
        )
        for ticket in tickets
    ]


def kept(push: Push) -> Push:
    """A copy of a push on the CPU; the memory of a push is used again."""
    buffers = {name: each.to("cpu", copy=True) for name, each in push.buffers.items()}
    return replace(push, grad=push.grad.to("cpu", copy=True), buffers=buffers)


def distance(one: Tensor, other: Tensor) -> float:
    """The distance of two tensors, relative to the second one."""
    expected = other.double()
    return ((one.double() - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def check_same(one: Push, other: Push, allowed: float) -> None:
    """Compare gradient, loss, buffers and numbers of two pushes."""
    assert distance(one.grad, other.grad) <= allowed
    assert one.loss is not None
    assert other.loss is not None
    assert abs(one.loss - other.loss) <= allowed * abs(other.loss)
    assert list(one.buffers) == list(other.buffers)
    for name, value in other.buffers.items():
        assert distance(one.buffers[name], value) <= allowed, name
    numbers = ("worker", "ticket", "stamp", "samples", "loss_scale")
    assert [getattr(one, name) for name in numbers] == [getattr(other, name) for name in numbers]
