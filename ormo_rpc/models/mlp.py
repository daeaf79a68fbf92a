"""The multilayer perceptron."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from ormo_rpc.models.base import ModelSection, is_probability
from ormo_rpc.options import option


class MLP(nn.Module):
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


@dataclass(frozen=True, kw_only=True)
class MLPSection(ModelSection):
    """Options of the multilayer perceptron."""

    name: str = option("mlp", "multilayer perceptron")
    hidden: int = option(128, "features of a hidden layer", valid=lambda n: n >= 1, expected="at least 1")
    depth: int = option(1, "number of hidden layers; 0 is logistic regression", valid=lambda n: n >= 0, expected="at least 0")
    dropout: float = option(
        0.0, "probability of dropping a hidden feature", valid=is_probability, expected="a number in [0, 1)"
    )

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """A perceptron for inputs of any shape."""
        return MLP([math.prod(input_shape), *[self.hidden] * self.depth, num_classes], self.dropout)
