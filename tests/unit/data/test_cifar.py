"""CIFAR-10 and CIFAR-100: pickles of every age are read, and hostile, damaged and changed ones refused."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets

from ormo_rpc.data import CIFAR10, CIFAR100
from ormo_rpc.data.cifar import read_arrays
from ormo_rpc.seeding import generator
from tests.support.datasets import CIFAR10_FILES, images, write_cifar10


def test_a_repackaged_cifar_is_read_in_the_official_order(tmp_path: Path) -> None:
    written = write_cifar10(tmp_path)
    data = CIFAR10(root=str(tmp_path), verify=False).load()
    assert (len(data.train), len(data.test), data.input_shape, data.num_classes) == (20, 4, (3, 32, 32), 10)
    inputs, labels = data.train.batch(torch.arange(20), None)
    std, mean = (torch.tensor(values).view(3, 1, 1) for values in (CIFAR10.STD, CIFAR10.MEAN))
    assert torch.equal((inputs * std + mean).mul(255).round(), torch.cat([written[name] for name in CIFAR10_FILES[:5]]).float())
    assert labels.tolist() == [number + place for number in range(5) for place in range(4)]


def test_only_training_images_of_cifar_are_augmented_and_only_if_wanted(tmp_path: Path) -> None:
    write_cifar10(tmp_path)

    def changes(augment: bool) -> list[bool]:
        data = CIFAR10(root=str(tmp_path), verify=False, augment=augment).load()
        everything = torch.arange(4)
        return [
            not torch.equal(half.batch(everything, generator(0, "augment", 0))[0], half.batch(everything, None)[0])
            for half in (data.train, data.test)
        ]

    assert changes(augment=True) == [True, False]
    assert changes(augment=False) == [False, False]


def test_cifar100_has_fine_labels(tmp_path: Path) -> None:
    (tmp_path / "cifar-100-python").mkdir()
    for name in ("train", "test"):
        batch = {"data": images(2, 3, 32).reshape(2, 3072).numpy(), "fine_labels": [99, 0], "coarse_labels": [19, 1]}
        (tmp_path / "cifar-100-python" / name).write_bytes(pickle.dumps(batch))
    data = CIFAR100(root=str(tmp_path), verify=False).load()
    assert data.num_classes == 100
    assert data.test.batch(torch.arange(2), None)[1].tolist() == [99, 0]


@pytest.mark.parametrize("old_name", [False, True], ids=["numpy._core", "numpy.core"])
@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_every_protocol_and_age_are_read(protocol: int, old_name: bool, tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    written = pickle.dumps({"data": array, "labels": [1, 2]}, protocol=protocol)
    if old_name and protocol < 4:  # later protocols put the length before a name
        written = written.replace(b"numpy._core", b"numpy.core")
        assert b"numpy.core" in written
    (tmp_path / "file").write_bytes(written)
    entry = read_arrays(tmp_path / "file")
    assert np.array_equal(entry["data"], array)
    assert entry["data"].dtype == np.uint8
    assert entry["labels"] == [1, 2]


class Attack:
    """Unpickling it runs a shell command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)  # pyright: ignore[reportDeprecated] - what attacks use


def test_a_pickle_that_wants_to_run_a_command_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    trace = tmp_path / "trace"
    hostile = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    hostile.write_bytes(pickle.dumps({"data": Attack(f"touch {trace}"), "labels": []}))
    message = (
        rf"^dataset\.root: {re.escape(str(hostile.parent))} cannot be read as CIFAR10: "
        r"UnpicklingError: posix\.system is no part of an array: refused$"
    )
    with pytest.raises(ValueError, match=message):
        CIFAR10(root=str(tmp_path), verify=False).load()
    assert not trace.exists()
    pickle.loads(hostile.read_bytes())  # noqa: S301 - the trap is a real one
    assert trace.exists()


@pytest.mark.parametrize(
    ("batch", "fault"),
    [
        ({"labels": [0]}, "KeyError: 'data'"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, "ValueError: 2 images, but 1 labels"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}, "ValueError: labels outside of 0 to 9"),
        ({"data": np.zeros((1, 3072), np.float32), "labels": [0]}, "ValueError: pixels of type torch.float32, expected bytes"),
    ],
    ids=["no pixels", "a label is missing", "wrong label", "no bytes"],
)
def test_pickles_with_something_else_in_them_are_refused(batch: dict[str, Any], fault: str, tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    (folder / "test_batch").write_bytes(pickle.dumps(batch))
    message = rf"^dataset\.root: {re.escape(str(folder))} cannot be read as CIFAR10: {re.escape(fault)}$"
    with pytest.raises(ValueError, match=message):
        CIFAR10(root=str(tmp_path), verify=False).load()


def test_files_with_another_md5_sum_are_refused_unless_verification_is_off(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    changed = tmp_path / "cifar-10-batches-py" / "data_batch_1"
    original = torchvision.datasets.CIFAR10.train_list[0][1]
    assert hashlib.md5(changed.read_bytes(), usedforsecurity=False).hexdigest() != original
    message = (
        rf"^dataset\.root: {re.escape(str(changed))} is not the original file: its md5 sum is not {original}; "
        r"delete it and fetch it again, or set dataset\.verify=false if it is a repackaged copy that you trust$"
    )
    with pytest.raises(ValueError, match=message):
        CIFAR10(root=str(tmp_path)).load()
