"""A model of D parameters whose gradient costs next to nothing, and data for it: what `throughput` trains.

Only a head of 8 parameters is used; the gradient of all others is zero, which a worker writes and pushes like any other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

FEATURES, CLASSES = 4, 2


class StandIn(nn.Module):
    """D parameters, of which the first 8 are used.

    Args:
        parameters: D.
    """

    def __init__(self, parameters: int) -> None:
        super().__init__()
        self.head = nn.Parameter(torch.zeros(CLASSES, FEATURES))
        self.rest = nn.Parameter(torch.zeros(parameters - CLASSES * FEATURES))

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits, shape (batch, classes)."""
        return inputs @ self.head.t()


def data() -> tuple[TensorDataset, TensorDataset]:
    """Training and test set of 64 samples each."""
    inputs, labels = torch.ones(64, FEATURES), torch.arange(64) % CLASSES
    return TensorDataset(inputs, labels), TensorDataset(inputs, labels)
