"""A model of D parameters, and data for it: what `throughput` runs, with workers that compute nothing (`worker.dummy`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset


class StandIn(nn.Module):
    """A vector.

    Args:
        parameters: D.
    """

    def __init__(self, parameters: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(parameters))

    def forward(self, inputs: Tensor) -> Tensor:
        """Nobody asks for it."""
        raise NotImplementedError("a model without a forward pass: set worker.dummy=true")


def data() -> tuple[TensorDataset, TensorDataset]:
    """Training and test set of 64 samples each, which nobody looks at."""
    inputs, labels = torch.zeros(64, 1), torch.arange(64) % 2
    return TensorDataset(inputs, labels), TensorDataset(inputs, labels)
