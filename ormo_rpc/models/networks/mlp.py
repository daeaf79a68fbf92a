"""The multilayer perceptron."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn


class MLPNetwork(nn.Module):
    """Linear layers with ReLU between them; inputs of any shape are flattened.

    Args:
        widths: The number of features of the input, of every hidden layer and of the output.
        dropout: The probability that a hidden feature is dropped.
    """

    def __init__(self, widths: list[int], dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise(widths[:-1]):
            layers += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits, shape (B, classes)."""
        return self.layers(inputs)
