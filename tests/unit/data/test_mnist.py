"""MNIST and Fashion-MNIST: idx files as torchvision reads them, and errors about missing and damaged ones."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision.datasets

from ormo_rpc.data import MNIST, FashionMNIST

SHARED = Path(__file__).parents[4] / "shared" / "data"


@pytest.fixture(scope="module")
def real_sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Fashion-MNIST as torchvision lays it out."""
    if not SHARED.is_dir():
        pytest.skip("../shared/data is absent")
    root = tmp_path_factory.mktemp("sets")
    subprocess.run([sys.executable, SHARED / "unpack.py", root, "fashion_mnist"], check=True, capture_output=True)
    return root


def test_fashion_mnist_is_what_torchvision_reads_and_has_these_moments(real_sets: Path) -> None:
    data = FashionMNIST(root=str(real_sets)).load()
    assert (len(data.train), len(data.test), data.input_shape, data.num_classes) == (60_000, 10_000, (1, 28, 28), 10)
    reference = torchvision.datasets.FashionMNIST(real_sets, train=False)
    inputs, labels = data.test.batch(torch.arange(10_000), None)
    assert torch.equal((inputs * 0.3530 + 0.2860).mul(255).round().squeeze(1), reference.data.float())
    assert torch.equal(labels, reference.targets)
    inputs, _ = data.train.batch(torch.arange(60_000), None)
    assert inputs.mean().item() == pytest.approx(0, abs=1e-3)
    assert inputs.std().item() == pytest.approx(1, abs=1e-3)


def write_mnist(root: Path, count: int = 3) -> Path:
    """Four tiny idx files: a header of big-endian numbers, then bytes."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for half in ("train", "t10k"):
        header = b"".join(number.to_bytes(4, "big") for number in (0x803, count, 28, 28))
        (folder / f"{half}-images-idx3-ubyte").write_bytes(header + bytes(range(28)) * 28 * count)
        header = b"".join(number.to_bytes(4, "big") for number in (0x801, count))
        (folder / f"{half}-labels-idx1-ubyte").write_bytes(header + bytes(range(count)))
    return folder


def test_idx_files_are_read_row_by_row(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    data = MNIST(root=str(tmp_path)).load()
    inputs, labels = data.train.batch(torch.arange(3), None)
    pixels = (inputs * 0.3081 + 0.1307).mul(255).round()
    assert torch.equal(pixels, torch.arange(28.0).expand(3, 1, 28, 28))
    assert labels.tolist() == [0, 1, 2]


def test_a_truncated_data_file_is_refused_before_the_run(tmp_path: Path) -> None:
    damaged = write_mnist(tmp_path) / "t10k-images-idx3-ubyte"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    message = rf"^dataset\.root: {re.escape(str(damaged.parent))} cannot be read as MNIST: RuntimeError: .*2252.*$"
    with pytest.raises(ValueError, match=message):
        MNIST(root=str(tmp_path)).load()


def test_missing_files_say_where_they_were_looked_for_and_what_to_do(tmp_path: Path) -> None:
    (write_mnist(tmp_path) / "t10k-labels-idx1-ubyte").unlink()
    folder = re.escape(str(tmp_path / "MNIST" / "raw"))
    message = (
        rf"^dataset\.root: MNIST is not in {folder}: t10k-labels-idx1-ubyte is missing; set dataset\.root=\.\.\. to the folder "
        r"that has MNIST/raw in it, or dataset\.download=true to fetch it$"
    )
    with pytest.raises(ValueError, match=message):
        MNIST(root=str(tmp_path)).load()
