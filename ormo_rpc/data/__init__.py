"""Data sets: where they come from (one file each), how a batch is made of them, and which samples a ticket means."""

from __future__ import annotations

from ormo_rpc.data.cifar import CIFAR10, CIFAR100
from ormo_rpc.data.custom import Custom
from ormo_rpc.data.digits import Digits
from ormo_rpc.data.mnist import MNIST, FashionMNIST
from ormo_rpc.data.sources import DataSection
from ormo_rpc.data.splits import ArraySplit, DataSet, MapSplit, MapStyle, Split
from ormo_rpc.data.tickets import Epochs

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "DATASETS",
    "MNIST",
    "ArraySplit",
    "Custom",
    "DataSection",
    "DataSet",
    "Digits",
    "Epochs",
    "FashionMNIST",
    "MapSplit",
    "MapStyle",
    "Split",
]

DATASETS: dict[str, type[DataSection]] = {
    "digits": Digits,
    "mnist": MNIST,
    "fashion_mnist": FashionMNIST,
    "cifar10": CIFAR10,
    "cifar100": CIFAR100,
    "custom": Custom,
}
"""The options of every data set by its name in the configuration."""
