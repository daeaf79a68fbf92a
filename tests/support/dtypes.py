"""Models whose trainable parameters have several dtypes, and the plain loop that trains them with explicit masters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 16


class Homogeneous(nn.Module):
    """A model of one dtype, such as ``module.to(torch.bfloat16)`` makes it, with dropout."""

    def __init__(self, dtype: str = "bfloat16") -> None:
        super().__init__()
        self.dtype: torch.dtype = getattr(torch, dtype)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), nn.ReLU(), nn.Dropout(0.1), nn.Linear(WIDTH, 10))
        self.net = net.to(self.dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs.to(self.dtype))


class Mixed(nn.Module):
    """A norm and a head in float32 around layers of 16 bits: one tied, one with a sparse gradient, one frozen, one promoted.

    Args:
        low: The dtype of these layers.
        shift: The dtype of one more parameter.
    """

    def __init__(self, low: str = "bfloat16", shift: str = "float32") -> None:
        super().__init__()
        self.low: torch.dtype = getattr(torch, low)
        self.first = nn.Linear(64, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH, dtype=self.low)
        self.third = nn.Linear(WIDTH, WIDTH, dtype=self.low)
        self.third.weight = self.second.weight
        self.table = nn.Embedding(4, WIDTH, sparse=True, dtype=self.low)
        self.frozen = nn.Parameter(torch.full((WIDTH,), 0.5, dtype=torch.float16), requires_grad=False)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.shift = nn.Parameter(torch.zeros(WIDTH, dtype=getattr(torch, shift)))
        self.scale = nn.Parameter(torch.ones(WIDTH, dtype=self.low))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        pixels = inputs.flatten(1)
        hidden = self.first(pixels).to(self.low)
        hidden = self.third(torch.tanh(self.second(hidden))) * self.frozen.to(self.low)
        hidden = hidden + self.table((pixels.sum(1) % 4).long())
        return self.head(self.norm(hidden.float() * self.scale + self.shift.float()))


class Masters:
    """SGD with momentum in the order of ``torch.optim.SGD``, at masters of float32 or more, one parameter at a time.

    Args:
        module: The model, whose parameters are set to the casts of the masters.
        lr: The learning rate.
        momentum: ``beta``.
        dtype: Of the masters.
    """

    def __init__(self, module: nn.Module, lr: float, momentum: float, dtype: torch.dtype = torch.float32) -> None:
        self.trained = {name: each for name, each in module.named_parameters() if each.requires_grad}
        self.values = {name: each.detach().to(dtype).clone() for name, each in self.trained.items()}
        self.velocity = {name: torch.zeros_like(each) for name, each in self.values.items()}
        self.lr, self.momentum, self.dtype = lr, momentum, dtype

    def gradients(self, backward: Callable[[], None]) -> dict[str, Tensor]:
        """Compute gradients at the casts of the masters, and return them in the masters' dtype."""
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.grad = None
                parameter.copy_(self.values[name])
        backward()
        found: dict[str, Tensor] = {}
        for name, parameter in self.trained.items():
            grad: Any = parameter.grad
            found[name] = torch.zeros_like(self.values[name]) if grad is None else grad.to(self.dtype).to_dense()
        return found

    def step(self, gradients: Mapping[str, Tensor]) -> None:
        """Take a step."""
        for name, grad in gradients.items():
            self.velocity[name] = self.momentum * self.velocity[name] + grad
            self.values[name] = self.values[name] - self.lr * self.velocity[name]
