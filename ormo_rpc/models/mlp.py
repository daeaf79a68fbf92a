"""The multilayer perceptron."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.models.base import Model, is_probability
from ormo_rpc.options import at_least_one, not_negative, option, register


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
    def build(self, input_shape: tuple[int, ...], num_classes: int) -> torch.nn.Module:
        from ormo_rpc.models.networks.mlp import MLPNetwork

        return MLPNetwork([math.prod(input_shape), *[self.hidden] * self.depth, num_classes], self.dropout)
