"""Data sets (one file each), batches of them, and the samples of each ticket."""

from __future__ import annotations

from ormo_rpc.data.cifar import CIFAR10, CIFAR100
from ormo_rpc.data.custom import CustomData
from ormo_rpc.data.digits import Digits
from ormo_rpc.data.iterables import IterableSplit
from ormo_rpc.data.mnist import MNIST, FashionMNIST
from ormo_rpc.data.padding import Pad
from ormo_rpc.data.sources import DataSource
from ormo_rpc.data.splits import ArraySplit, DataSet, MapSplit, MapStyle, Resident, Split
from ormo_rpc.data.tickets import Epochs

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "ArraySplit",
    "CustomData",
    "DataSet",
    "DataSource",
    "Digits",
    "Epochs",
    "FashionMNIST",
    "IterableSplit",
    "MapSplit",
    "MapStyle",
    "Pad",
    "Resident",
    "Split",
]
