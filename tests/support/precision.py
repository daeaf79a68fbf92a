"""Models for runs under autocast and compiled ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH = 16


class Shared(nn.Module):
    """A weight that a pass uses twice, of which autocast keeps the cast, a norm, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.head = nn.Linear(64, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 10)
        self.drop = nn.Dropout(0.1)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs.flatten(1)).relu()
        return self.head(self.drop(self.shared(self.shared(hidden).relu())))


class OwnAutocast(Shared):
    """A pass with an autocast of its own."""

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(inputs).float()


class Normed(nn.Module):
    """Batch norms, one of them called twice, and a buffer that each pass changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(64, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 10)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.drop = nn.Dropout(0.1)
        self.average: Tensor
        self.register_buffer("average", torch.zeros(WIDTH))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.norm(self.first(inputs.flatten(1))).relu()
        hidden = self.norm(self.second(hidden))
        if self.training:
            with torch.no_grad():
                self.average.mul_(0.9).add_(hidden.mean(0), alpha=0.1)
        return self.head(self.drop(hidden + self.average))
