"""Networks in float64, which tell what rounding in fewer bits makes of the same gradient."""

from __future__ import annotations

import torch
from typing_extensions import override

from ormo_rpc.models.networks.resnet20 import ResNet20Network
from ormo_rpc.models.shortcut import Shortcut


class WideResNet20(torch.nn.Module):
    """ResNet-20 of the same initial weights as ``model=resnet20``, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.network = ResNet20Network(3, 10, Shortcut.identity).double()

    @override
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images.double())
