"""Models, each in the file of its name: the network and its options."""

from __future__ import annotations

from ormo_rpc.models.base import ModelSection
from ormo_rpc.models.cnn import CNN, CNNSection
from ormo_rpc.models.custom import CustomSection
from ormo_rpc.models.mlp import MLP, MLPSection
from ormo_rpc.models.resnet20 import ResNet20, ResNet20Section, Shortcut
from ormo_rpc.models.torchvision_model import TorchvisionSection

__all__ = [
    "CNN",
    "MLP",
    "MODELS",
    "CNNSection",
    "CustomSection",
    "MLPSection",
    "ModelSection",
    "ResNet20",
    "ResNet20Section",
    "Shortcut",
    "TorchvisionSection",
]

MODELS: dict[str, type[ModelSection]] = {
    "mlp": MLPSection,
    "cnn": CNNSection,
    "resnet20": ResNet20Section,
    "torchvision": TorchvisionSection,
    "custom": CustomSection,
}
"""The options of every model by its name in the configuration."""
