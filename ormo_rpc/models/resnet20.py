"""The residual network for CIFAR with 20 layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.models.base import Model, image_shape
from ormo_rpc.models.shortcut import Shortcut
from ormo_rpc.options import option, register


@register("resnet20")
@dataclass(frozen=True, kw_only=True)
class ResNet20(Model):
    """The residual network of 20 layers for CIFAR (He et al. 2015)."""

    shortcut: Shortcut = option(Shortcut.identity, "shortcuts between stages: identity (no parameters) or projection (1x1)")

    @override
    def build(self, input_shape: tuple[int, ...], num_classes: int) -> torch.nn.Module:
        from ormo_rpc.models.networks.resnet20 import ResNet20Network

        channels, _, _ = image_shape(self.name, input_shape)
        return ResNet20Network(channels, num_classes, self.shortcut)
