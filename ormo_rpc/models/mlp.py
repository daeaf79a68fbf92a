"""The multilayer perceptron."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn
from typing_extensions import override

from ormo_rpc.models.base import Model, is_probability
from ormo_rpc.options import at_least_one, not_negative, option, register


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


@register("mlp")
@dataclass(frozen=True, kw_only=True)
class MLP(Model):
    """A multilayer perceptron; inputs of any shape are flattened."""

    hidden: int = option(128, "features of a hidden layer", valid=at_least_one, expected="a whole number >= 1")
    depth: int = option(
        1, "number of hidden layers; 0 is logistic regression", valid=not_negative, expected="a whole number >= 0"
    )
    dropout: float = option(
        0.0, "probability of dropping a hidden feature", valid=is_probability, expected="a number in [0, 1)"
    )

    @override
    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        return MLPNetwork([math.prod(input_shape), *[self.hidden] * self.depth, num_classes], self.dropout)
