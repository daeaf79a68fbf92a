"""A model and a data set whose code "changes" between two runs: a test sets the attributes of this module."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

LAYERS: tuple[str, ...] = ("first", "second")
"""The names of the square layers, in the order in which the model makes them."""
FROZEN_VALUE = 1.0
"""The value of the frozen scale."""
SAMPLES = 64
"""Training samples of the data set."""
LABELS_FIRST = 0
"""The label of the first class."""
HERE = __name__
TRAIN = {"batch_size": 8, "epochs": 2, "lr": 0.01}
CONFIG: dict[str, Any] = {
    "runtime": {"name": "sim"},
    "logger": {"name": "none"},
    "model": {"_target_": f"{HERE}.net"},
    "dataset": {"_target_": f"{HERE}.data"},
    "train": TRAIN,
    "workers": 2,
    "checkpoint": {"every": 12},
}
"""A run of 16 gradients."""


class Net(nn.Module):
    """Square layers of equal shapes, a batch norm, and a frozen scale."""

    def __init__(self) -> None:
        super().__init__()
        for name in LAYERS:
            setattr(self, name, nn.Linear(3, 3))
        self.norm = nn.BatchNorm1d(3)
        self.scale = nn.Parameter(torch.full((3,), FROZEN_VALUE), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The layers, in the order of their names."""
        for name in sorted(LAYERS):
            inputs = getattr(self, name)(inputs)
        return self.norm(inputs) * self.scale


def net() -> nn.Module:
    """Make the model of two or more layers."""
    return Net()


def data() -> tuple[TensorDataset, TensorDataset]:
    """Make the same samples each time, as many as asked for."""
    inputs = torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(1))
    labels = (inputs.argmax(1) + LABELS_FIRST) % 3
    return TensorDataset(inputs, labels), TensorDataset(inputs[:16], labels[:16])


class Frozen(nn.Module):
    """A trained layer on features that never change.

    Args:
        features: The frozen weights, shape (3, 3).
        buffer: Keep them as a buffer instead.
    """

    def __init__(self, features: torch.Tensor, *, buffer: bool = False) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)
        self.backbone = nn.Module()
        if buffer:
            self.backbone.register_buffer("weight", features)
        else:
            self.backbone.register_parameter("weight", nn.Parameter(features, requires_grad=False))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Features, then the layer."""
        return self.head(inputs @ self.features)

    @property
    def features(self) -> torch.Tensor:
        """The frozen weights."""
        return self.backbone.weight  # pyright: ignore[reportReturnType] # set above


def unseeded_data() -> tuple[TensorDataset, TensorDataset]:
    """Draw labels from a generator that nothing seeds, as many as `data` has."""
    inputs = torch.randn(SAMPLES, 3)
    labels = torch.from_numpy(np.random.default_rng().integers(0, 3, SAMPLES))
    return TensorDataset(inputs, labels), TensorDataset(inputs[:16], labels[:16])


def fresh_entropy(*, buffer: bool = False) -> nn.Module:
    """Draw frozen weights from a generator that nothing seeds."""
    return Frozen(torch.from_numpy(np.random.default_rng().normal(size=(3, 3)).astype("float32")), buffer=buffer)


def seeded_sources() -> nn.Module:
    """Draw frozen weights from the three generators that are seeded."""
    drawn = [random.random(), *np.random.normal(size=3), *torch.randn(5).tolist()]
    return Frozen(torch.tensor(drawn, dtype=torch.float32).view(3, 3))


def by_process() -> nn.Module:
    """Draw frozen weights that differ from process to process, but not within one."""
    return Frozen(torch.randn(3, 3, generator=torch.Generator().manual_seed(os.getpid())))


def trained_by_process() -> nn.Module:
    """Draw trained weights that differ from process to process, but not within one."""
    return by_process().requires_grad_()
