"""Models whose forward passes change buffers, trained by a server and one worker, and by plain PyTorch on the same batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from ormo_rpc import build_server
from ormo_rpc.data import ArraySplit, Epochs
from ormo_rpc.models.flat import FlatModel
from ormo_rpc.options import find
from ormo_rpc.seeding import seeded
from ormo_rpc.server.buffers import RunningBuffers
from ormo_rpc.server.parameter_server import ParameterServer
from ormo_rpc.worker.worker import Worker

SAMPLES, BATCH, INPUTS, FEATURES, CLASSES = 40, 8, 16, 6, 3
EPOCHS = Epochs(SAMPLES, BATCH, seed=0)
RATE = 0.1
Make = Callable[[], nn.Module]


def split() -> ArraySplit:
    generator = torch.Generator().manual_seed(6)
    pixels = torch.randint(0, 256, (SAMPLES, 1, 4, 4), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, CLASSES, (SAMPLES,), generator=generator)
    return ArraySplit(pixels, labels, scale=255, mean=[0.5], std=[0.5])


class Body(nn.Module):
    """A linear layer, then another one, with any layer between them."""

    def __init__(self, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(INPUTS, FEATURES)
        self.layer = layer or nn.Identity()
        self.last = nn.Linear(FEATURES, CLASSES)

    def between(self, features: Tensor) -> Tensor:
        """Transform the activations between the linear layers."""
        return self.layer(features)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.between(self.first(inputs.flatten(1))).relu())


def made(make: Make, *, pretrained: bool = True) -> nn.Module:
    """The model with weights of one seed; the running statistics as if it had been trained before."""
    torch.manual_seed(1)
    module = make()
    for child in module.modules():
        mean, variance = getattr(child, "running_mean", None), getattr(child, "running_var", None)
        if pretrained and isinstance(mean, Tensor) and isinstance(variance, Tensor):
            mean.fill_(0.5)
            variance.fill_(4.0)
    return module


def loss_of(module: nn.Module, ticket: int) -> Tensor:
    """The loss of a ticket's batch."""
    inputs, targets = split().batch(EPOCHS.indices(ticket), None)
    return functional.cross_entropy(module(inputs), targets)


def plain(make: Make, steps: int) -> dict[str, Tensor]:
    """Train in plain PyTorch, with the random draws of the same tickets; return the ``state_dict``."""
    module = made(make).train()
    for ticket in range(steps):
        module.zero_grad()
        with seeded(0, "forward", ticket):
            loss_of(module, ticket).backward()
        with torch.no_grad():  # torch.optim.SGD takes four seconds to import
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=RATE)
    return module.state_dict()


class Training:
    """A server and a worker in this process."""

    def __init__(self, make: Make, *, workers: int = 1, **options: Any) -> None:
        self.model = FlatModel(made(make))
        given: dict[str, Any] = {"algorithm": "naive", "lr": RATE, "momentum": 0.0, **options}
        self.worker = Worker(self.model, split(), EPOCHS, find("algorithm", given["algorithm"])(), seed=0)
        self.server: ParameterServer = build_server(
            params=self.model.flat_params(),
            num_workers=workers,
            buffers=RunningBuffers(self.model.buffers.tensors, self.model.buffers.rules),
            **given,
        )
        self.replies = self.server.start()

    def step(self, count: int = 1) -> Training:
        """Settle the oldest replies."""
        for _ in range(count):
            self.replies += self.server.receive(self.worker.compute(self.replies.pop(0)))
        return self

    def exported(self) -> dict[str, Tensor]:
        """The ``state_dict`` that is written for the user."""
        return self.model.state_dict(self.server.params, self.server.buffers.copy())
