"""A model of D parameters and data for it, for workers that compute nothing (``worker.dummy=true``)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from typing_extensions import override


class DummyModel(nn.Module):
    """A vector of parameters without a forward pass.

    Args:
        parameters: D.
    """

    def __init__(self, parameters: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(parameters))

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        raise NotImplementedError("DummyModel has no forward pass: set worker.dummy=true")


def data() -> tuple[TensorDataset, TensorDataset]:
    """Training and test set of 64 samples each, which are never read."""
    inputs, labels = torch.zeros(64, 1), torch.arange(64) % 2
    return TensorDataset(inputs, labels), TensorDataset(inputs, labels)
