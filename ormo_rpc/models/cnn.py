"""A small convolution net for small images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.models.base import Model, image_shape, is_probability
from ormo_rpc.options import option, register


@register("cnn")
@dataclass(frozen=True, kw_only=True)
class CNN(Model):
    """A small convolution net for images of at least 4x4 pixels."""

    dropout: float = option(0.0, "probability of dropping a feature", valid=is_probability, expected="a number in [0, 1)")

    @override
    def build(self, input_shape: tuple[int, ...], num_classes: int) -> torch.nn.Module:
        from ormo_rpc.models.networks.cnn import CNNNetwork

        return CNNNetwork(image_shape(self.name, input_shape, smallest=4), num_classes, self.dropout)
