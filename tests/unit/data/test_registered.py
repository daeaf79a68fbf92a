"""Every registered data set has its tests in this folder, that of own loops apart (`unit/own_loop`)."""

from __future__ import annotations

from ormo_rpc.data import CIFAR10, CIFAR100, MNIST, CustomData, Digits, FashionMNIST
from ormo_rpc.data.own_loop import OwnLoopData
from ormo_rpc.options import parts


def test_every_registered_data_set_is_tested_here() -> None:
    assert {CIFAR10, CIFAR100, MNIST, FashionMNIST, Digits, CustomData, OwnLoopData} == set(parts("dataset").values())
