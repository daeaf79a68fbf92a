"""Data sets: batches, the samples of a ticket, and errors about files that are missing, damaged or hostile."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from ormo_rpc.data import (
    CIFAR10,
    CIFAR100,
    MNIST,
    ArraySplit,
    CustomData,
    DataSet,
    Digits,
    Epochs,
    FashionMNIST,
    MapSplit,
    digits,
)
from ormo_rpc.data.cifar import read_arrays
from ormo_rpc.options import parts
from ormo_rpc.seeding import generator

SHARED = Path(__file__).parents[4] / "shared" / "data"


def images(count: int, channels: int, size: int) -> Tensor:
    return torch.randint(1, 256, (count, channels, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))


def split(pixels: Tensor, *, augment: bool) -> ArraySplit:
    """Pixels as they are: neither scaled nor shifted."""
    nothing, one = [0.0] * pixels.shape[1], [1.0] * pixels.shape[1]
    return ArraySplit(pixels, torch.arange(len(pixels)), scale=1, mean=nothing, std=one, augment=augment)


# -- batches ----------------------------------------------------------------------------------------------------------


def test_a_batch_is_scaled_and_normalised_per_channel() -> None:
    pixels = images(5, 2, 3)
    inputs, labels = ArraySplit(pixels, torch.arange(5), scale=255, mean=(0.25, 0.5), std=(0.5, 2.0)).batch(
        torch.tensor([3, 1]), None
    )
    assert inputs.dtype == torch.float32
    assert labels.tolist() == [3, 1]
    for place, sample in enumerate([3, 1]):
        for channel, (mean, std) in enumerate([(0.25, 0.5), (0.5, 2.0)]):
            expected = (pixels[sample, channel].double() / 255 - mean) / std
            torch.testing.assert_close(inputs[place, channel].double(), expected, atol=1e-6, rtol=0)


def test_augmentation_equals_a_slow_loop_over_samples_and_pixels() -> None:
    pixels = images(6, 3, 8)
    inputs, _ = split(pixels, augment=True).batch(torch.arange(6), torch.Generator().manual_seed(11))
    chance = torch.Generator().manual_seed(11)
    down, right = torch.randint(0, 9, (2, 6, 1), generator=chance).squeeze(2).tolist()
    flips = torch.randint(0, 2, (6,), generator=chance).tolist()
    assert 0 < sum(flips) < 6  # both kinds are seen
    for n in range(6):
        expected = torch.zeros(3, 8, 8)
        for row in range(8):
            for column in range(8):
                y, x = row + down[n] - 4, column + right[n] - 4
                if 0 <= y < 8 and 0 <= x < 8:
                    expected[:, row, 7 - column if flips[n] else column] = pixels[n, :, y, x]
        assert torch.equal(inputs[n], expected)


def test_all_81_offsets_and_both_orientations_occur_about_equally_often() -> None:
    # One bright pixel in the middle of 17 x 17 is never cut off, and its place tells the offset: 9 x 9 places.
    pixels = torch.zeros(1, 1, 17, 17, dtype=torch.uint8)
    pixels[0, 0, 8, 8:10] = torch.tensor([1, 2])  # brightest on the right unless mirrored
    inputs, _ = split(pixels, augment=True).batch(torch.zeros(8_100, dtype=torch.int64), torch.Generator().manual_seed(0))
    mirrored = inputs.flatten(1).argmax(1) < (inputs == 1).flatten(1).float().argmax(1)
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.03)  # deviation 0.5 / sqrt(8100) = 0.006
    places = inputs[~mirrored].flatten(1).argmax(1).bincount()
    assert (places > 0).sum() == 81
    assert places[places > 0].min() > 20  # 50 expected, deviation 7


def test_the_augmentation_is_drawn_from_the_generator_alone() -> None:
    data = split(images(20, 1, 8), augment=True)
    torch.manual_seed(1)
    first, _ = data.batch(torch.arange(20), generator(0, "augment", 5))
    after = torch.rand(1)
    torch.manual_seed(2)
    again, _ = data.batch(torch.arange(20), generator(0, "augment", 5))
    other, _ = data.batch(torch.arange(20), generator(0, "augment", 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)


@pytest.mark.parametrize(("augment", "given_generator"), [(True, False), (False, True)])
def test_nothing_is_augmented_for_evaluation_or_where_it_is_switched_off(augment: bool, given_generator: bool) -> None:
    pixels = images(20, 1, 8)
    chance = torch.Generator().manual_seed(0) if given_generator else None
    inputs, _ = split(pixels, augment=augment).batch(torch.arange(20), chance)
    assert torch.equal(inputs, pixels.float())


class Noisy(Dataset[tuple[Tensor, int]]):
    """A user's dataset that augments with torch's global generator."""

    def __init__(self, size: int = 6) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((2, 3), float(index)) + torch.rand(()), index % 4


def test_a_map_style_dataset_is_collated_in_the_order_asked_for() -> None:
    torch.manual_seed(0)
    noise = torch.stack([torch.rand(()) for _ in range(3)])
    torch.manual_seed(0)
    inputs, labels = MapSplit(Noisy()).batch(torch.tensor([5, 0, 3]), None)
    assert torch.equal(inputs[:, 1, 2], torch.tensor([5.0, 0.0, 3.0]) + noise)
    assert inputs.shape == (3, 2, 3)
    assert labels.dtype == torch.int64
    assert labels.tolist() == [1, 0, 3]


# -- tickets ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 70), st.integers(0, 3), st.integers(0, 9))
def test_every_epoch_covers_every_sample_once(num_samples: int, batch_size: int, epoch: int, seed: int) -> None:
    epochs = Epochs(num_samples, batch_size, seed)
    tickets = range(epochs.total_tickets(epoch), epochs.total_tickets(epoch + 1))
    batches = [epochs.indices(ticket).tolist() for ticket in tickets]
    assert sorted(itertools.chain.from_iterable(batches)) == list(range(num_samples))
    assert len(batches) == epochs.batches_per_epoch == (num_samples + batch_size - 1) // batch_size
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert 1 <= len(batches[-1]) <= batch_size


@given(st.lists(st.integers(0, 40), max_size=30))
def test_the_samples_of_a_ticket_do_not_depend_on_earlier_tickets(asked: list[int]) -> None:
    used = Epochs(23, 5, seed=3)  # 5 tickets per epoch: the 41 tickets span 9 epochs
    for ticket in asked:
        assert torch.equal(used.indices(ticket), Epochs(23, 5, seed=3).indices(ticket))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(Epochs(50, 50, seed).indices(epoch).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_the_order_of_an_epoch_is_this_permutation() -> None:
    # Resumed runs and replays need it to stay what it is from one version to the next.
    assert torch.equal(Epochs(1000, 1000, seed=0).indices(7), torch.randperm(1000, generator=generator(0, "order", 7)))


def test_an_empty_training_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^dataset: the training set is empty, expected at least one sample$"):
        Epochs(0, 8, seed=0)


# -- digits -----------------------------------------------------------------------------------------------------------


def test_the_digits_are_divided_once_and_for_all_with_equal_shares_of_every_class() -> None:
    torch.manual_seed(0)
    first = Digits().load()
    torch.manual_seed(1)
    np.random.default_rng(1)
    again = Digits().load()
    assert (len(first.train), len(first.test), first.input_shape, first.num_classes) == (1437, 360, (1, 8, 8), 10)
    for one, other in [(first.train, again.train), (first.test, again.test)]:
        everything = torch.arange(len(one))
        inputs, labels = one.batch(everything, None)
        assert torch.equal(inputs, other.batch(everything, None)[0])
        assert inputs.shape == (len(one), 1, 8, 8)
        assert labels.bincount().float().div(len(one)).sub(0.1).abs().max() < 0.005  # the ten digits are about a tenth each


@pytest.mark.parametrize("scans", [digits.SCANS, "no/such/file"], ids=["file", "library"])
def test_the_digits_are_divided_as_scikit_learn_divides_them(scans: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    monkeypatch.setattr(digits, "SCANS", scans)
    everything, labels = load_digits(return_X_y=True)
    parts = train_test_split(everything, labels, test_size=360, random_state=0, stratify=labels)
    data = Digits().load()
    for half, x, y in ((data.train, parts[0], parts[2]), (data.test, parts[1], parts[3])):
        inputs, targets = half.batch(torch.arange(len(half)), None)
        assert torch.equal(targets, torch.as_tensor(y))
        torch.testing.assert_close((inputs * 0.3760 + 0.3053).flatten(1) * 16, torch.as_tensor(x).float(), rtol=0, atol=1e-5)


def test_the_digits_are_scikit_learns_scans_normalised() -> None:
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    known = {(tuple(scan), int(label)) for scan, label in zip(scans.tolist(), labels, strict=True)}
    data = Digits().load()
    seen: list[tuple[tuple[float, ...], int]] = []
    for half in (data.train, data.test):
        inputs, targets = half.batch(torch.arange(len(half)), None)
        pixels = ((inputs.double() * 0.3760 + 0.3053) * 16).round().flatten(1)
        seen += [(tuple(scan), label) for scan, label in zip(pixels.tolist(), targets.tolist(), strict=True)]
    assert set(seen) == known
    assert len(seen) == 1797
    assert (scans / 16).mean() == pytest.approx(0.3053, abs=1e-4)
    assert (scans / 16).std() == pytest.approx(0.3760, abs=1e-4)


# -- idx files --------------------------------------------------------------------------------------------------------


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
        MNIST(root=str(tmp_path)).prepare()


def test_missing_files_say_where_they_were_looked_for_and_what_to_do(tmp_path: Path) -> None:
    (write_mnist(tmp_path) / "t10k-labels-idx1-ubyte").unlink()
    folder = re.escape(str(tmp_path / "MNIST" / "raw"))
    message = (
        rf"^dataset\.root: MNIST is not in {folder}: t10k-labels-idx1-ubyte is missing; set dataset\.root=\.\.\. to the folder "
        r"that has MNIST/raw in it, or dataset\.download=true to fetch it$"
    )
    for act in (MNIST(root=str(tmp_path)).prepare, MNIST(root=str(tmp_path)).load):
        with pytest.raises(ValueError, match=message):
            act()


# -- pickles ----------------------------------------------------------------------------------------------------------

CIFAR10_FILES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def write_cifar10(root: Path, protocol: int = 4) -> dict[str, Tensor]:
    """Six pickles of four images each; the labels of file number f are f, ..., f + 3."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    written: dict[str, Tensor] = {}
    for number, name in enumerate(CIFAR10_FILES):
        written[name] = images(4, 3, 32).roll(number, 0)
        batch = {"data": written[name].reshape(4, 3072).numpy(), "labels": [number + place for place in range(4)]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=protocol))
    return written


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
        CIFAR10(root=str(tmp_path), verify=False).prepare()
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


# -- downloads --------------------------------------------------------------------------------------------------------


class Web:
    """A substitute for the web: writes the files and counts how often."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fault: Exception | None = None) -> None:
        self.visits = 0
        self.fault = fault
        monkeypatch.setattr(CIFAR10, "fetch", lambda section: self.fetch(section.root_folder))

    def fetch(self, root: Path) -> None:
        """Take the place of `CIFAR10.fetch`."""
        self.visits += 1
        with (root / ".download.lock").open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody else gets in meanwhile
        if self.fault is not None:
            raise self.fault
        write_cifar10(root)


def test_missing_files_are_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    web = Web(monkeypatch)
    section = CIFAR10(root=str(tmp_path / "new"), download=True, verify=False)
    section.prepare()
    section.prepare()
    assert web.visits == 1
    assert len(section.load().train) == 20


def test_a_process_that_waited_for_the_download_lock_does_not_fetch_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web = Web(monkeypatch)

    def flock(_file: Any, _operation: int) -> None:
        write_cifar10(tmp_path)  # the other run finished while this one waited

    monkeypatch.setattr("fcntl.flock", flock)
    CIFAR10(root=str(tmp_path), download=True, verify=False).prepare()
    assert web.visits == 0


def test_nothing_is_fetched_without_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    web = Web(monkeypatch)
    with pytest.raises(ValueError, match=r"^dataset\.root: CIFAR10 is not in .*$"):
        CIFAR10(root=str(tmp_path)).prepare()
    assert web.visits == 0


def test_a_download_that_fails_says_where_to_put_the_files_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Web(monkeypatch, fault=OSError("no route to host"))
    folder = re.escape(str(tmp_path / "cifar-10-batches-py"))
    message = rf"^dataset\.download: CIFAR10 cannot be fetched: no route to host; put the files into {folder} by hand$"
    with pytest.raises(ValueError, match=message):
        CIFAR10(root=str(tmp_path), download=True).prepare()


# -- the user's own ---------------------------------------------------------------------------------------------------


class Labelled(TensorDataset):
    """A user's dataset that names its classes."""

    classes = ("cat", "dog", "bird", "fish", "bee", "ant", "owl")


def make_data_set() -> DataSet:
    half = MapSplit(Noisy())
    return DataSet(half, half, (2, 3), 4)


def make_pair(count: int = 6, num_classes: int = 0) -> tuple[Noisy, Noisy]:
    del num_classes  # is there to be found among the keywords
    return Noisy(count), Noisy(2)


def make_labelled_pair() -> list[Labelled]:
    return [Labelled(torch.zeros(3, 5), torch.tensor([0, 1, 2], dtype=torch.int32)) for _ in range(2)]


def make_items(*items: Any) -> Callable[[], tuple[Sequence[Any], Sequence[Any]]]:
    return lambda: (items, items)


make_nonsense = dict
make_nothing = make_items()
make_bare_tensors = make_items(torch.zeros(3))
make_fractions = make_items((torch.zeros(3), 0.5))


def custom(function: str, **kwargs: Any) -> CustomData:
    return CustomData(_target_=f"{__name__}.{function}", kwargs=kwargs)


def test_a_custom_function_may_return_a_whole_data_set() -> None:
    data = custom("make_data_set").load()
    assert (len(data.train), data.input_shape, data.num_classes) == (6, (2, 3), 4)


@pytest.mark.parametrize(
    ("function", "kwargs", "shape", "num_classes", "origin"),
    [
        ("make_pair", {"count": 6}, (2, 3), 4, "its largest label"),
        ("make_pair", {"count": 3}, (2, 3), 3, "its largest label"),
        ("make_pair", {"num_classes": 9}, (2, 3), 9, "dataset.num_classes"),
        ("make_labelled_pair", {}, (5,), 7, "its attribute classes"),
    ],
)
def test_of_a_pair_of_datasets_shape_and_classes_are_found_and_logged(
    function: str,
    kwargs: dict[str, Any],
    shape: tuple[int, ...],
    num_classes: int,
    origin: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    data = custom(function, **kwargs).load()
    assert (data.input_shape, data.num_classes) == (shape, num_classes)
    assert caplog.messages == [f"{__name__}.{function}: {num_classes} classes, from {origin}"]
    inputs, labels = data.train.batch(torch.tensor([2, 1]), None)
    assert inputs.shape == (2, *shape)
    assert (labels.dtype, labels.tolist()) == (torch.int64, [2, 1])


@pytest.mark.parametrize(
    ("function", "kwargs", "message"),
    [
        ("make_nonsense", {}, r".*\.make_nonsense returned dict, expected a DataSet or a pair .*"),
        ("make_nothing", {}, r".*\.make_nothing returned an empty training set"),
        ("make_bare_tensors", {}, r"the items of .*\.make_bare_tensors must be pairs \(input tensor, class number\).*"),
        ("make_fractions", {}, r"the items of .* must be pairs .*; the first has the label tensor\(\[0\.5.*"),
        ("make_pair", {"size": 6}, r"'.*\.make_pair' takes \(.*\).*, not dataset\.size=6: .* argument 'size'"),
        ("no_such", {}, r"'.*\.no_such' cannot be imported: .* has no attribute 'no_such'; is its folder on PYTHONPATH\?"),
        ("SHARED", {}, r"'.*\.SHARED' is .*, expected a function or class"),
    ],
)
def test_a_custom_function_that_does_not_work_is_one_clear_error(function: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^dataset\._target_: {message}$"):
        custom(function, **kwargs).prepare()


@pytest.mark.parametrize("path", ["", "function", "my module.f", "module."])
def test_a_target_that_is_no_dotted_path_is_refused_before_any_import(path: str) -> None:
    with pytest.raises(ValueError, match=rf"^dataset\._target_: got '{path}', expected a dotted path such as .*$"):
        CustomData(_target_=path)


def test_every_registered_data_set_is_tested_here() -> None:
    assert {CIFAR10, CIFAR100, MNIST, FashionMNIST, Digits, CustomData} == set(parts("dataset").values())
