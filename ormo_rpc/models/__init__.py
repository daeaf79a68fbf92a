"""Models, each in the file of its name: the network and its options."""

from __future__ import annotations

from ormo_rpc.models.base import Model
from ormo_rpc.models.cnn import CNN
from ormo_rpc.models.custom import CustomModel
from ormo_rpc.models.mlp import MLP
from ormo_rpc.models.resnet20 import ResNet20
from ormo_rpc.models.shortcut import Shortcut
from ormo_rpc.models.torchvision_model import Torchvision

__all__ = ["CNN", "MLP", "CustomModel", "Model", "ResNet20", "Shortcut", "Torchvision"]
