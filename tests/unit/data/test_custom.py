"""A user's own data set by a dotted path: its shape, its classes, and one clear error for each that does not work."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from ormo_rpc.data import CustomData, DataSet, MapSplit
from ormo_rpc.data.held_out import hold_out
from ormo_rpc.tasks.segmentation import Segmentation
from tests.support.datasets import Noisy


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


SHARED = Path(__file__)  # neither a function nor a class

make_nonsense = dict
make_nothing = make_items()


def make_number() -> int:
    return 3


def make_numbers() -> tuple[int, int]:
    return 3, 4


def make_four() -> tuple[Noisy, ...]:
    return (Noisy(),) * 4


def make_half() -> dict[str, Noisy]:
    return {"train": Noisy(), "dev": Noisy()}


def make_loader() -> tuple[DataLoader[Any], DataLoader[Any]]:
    loader = DataLoader(Noisy())
    return loader, loader


def make_endless() -> tuple[Any, Any]:
    return itertools.count(), itertools.count()


make_bare_tensors = make_items(torch.zeros(3))
make_fractions = make_items((torch.zeros(3), 0.5))
make_unlabelled = make_items({"pixels": torch.zeros(3)})
make_pictures = make_items((SHARED, 1))


def custom(function: str, **kwargs: Any) -> CustomData:
    return CustomData(_target_=f"{__name__}.{function}", kwargs=kwargs)


def test_a_custom_function_may_return_a_whole_data_set() -> None:
    data = custom("make_data_set").load()
    assert (len(data.train), data.input_shape, data.num_classes) == (6, (2, 3), 4)


@pytest.mark.parametrize(
    ("function", "kwargs", "shape", "num_classes", "origin"),
    [
        ("make_pair", {"count": 6}, (2, 3), 4, "its largest target"),
        ("make_pair", {"count": 3}, (2, 3), 3, "its largest target"),
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
    assert data.known_classes is None  # nobody has asked
    assert (data.input_shape, data.num_classes) == (shape, num_classes)
    assert data.known_classes == num_classes
    assert caplog.messages == [f"{__name__}.{function}: {num_classes} classes, from {origin}"]
    inputs, labels = data.train.batch(torch.tensor([2, 1]), None)
    assert inputs.shape == (2, *shape)
    assert labels.tolist() == [2, 1]


def test_a_given_number_of_classes_needs_no_counting() -> None:
    assert custom("make_pair", num_classes=9).load().known_classes == 9


def make_masks() -> tuple[TensorDataset, TensorDataset]:
    masks = torch.randint(-1, 5, (4, 8, 8), generator=torch.Generator().manual_seed(0))
    masks[masks == -1] = -100
    half = TensorDataset(torch.zeros(4, 1, 8, 8), masks)
    return half, half


def make_texts() -> tuple[list[Any], list[Any]]:
    items = [
        (torch.tensor([1, 2, 3]), torch.tensor([2, 3, 9], dtype=torch.int32)),
        (torch.tensor([4, 5, 6]), torch.tensor([5, 6, 7])),
    ]
    return items, items


@pytest.mark.parametrize(
    ("function", "shape", "targets", "num_classes"), [("make_masks", (1, 8, 8), (8, 8), 5), ("make_texts", (3,), (3,), 10)]
)
def test_the_targets_of_an_item_may_be_a_tensor_of_class_numbers(
    function: str, shape: tuple[int, ...], targets: tuple[int, ...], num_classes: int
) -> None:
    data = custom(function).load()
    assert (data.input_shape, data.num_classes) == (shape, num_classes)
    assert data.test.batch(torch.arange(2), None)[1].shape == (2, *targets)


def make_void_masks(dtype: str = "int64") -> tuple[TensorDataset, TensorDataset]:
    masks = torch.randint(0, 21, (4, 8, 8), generator=torch.Generator().manual_seed(0))
    masks[:, :2] = 255
    masks[3] = 255  # nothing of the last one counts
    half = TensorDataset(torch.zeros(4, 1, 8, 8), masks.to(getattr(torch, dtype)))
    return half, half


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("dtype", ["int64", "uint8", "uint16"])
def test_what_does_not_count_is_no_class(held_out: bool, dtype: str) -> None:
    data = custom("make_void_masks", dtype=dtype).load()
    if held_out:
        data = hold_out(data, 1, torch.Generator().manual_seed(0))
    masks = data.test.batch(torch.arange(4), None)[1].flatten().tolist()
    expected = 1 + max(set(masks) - {255})
    assert expected < 22
    task = Segmentation(ignore_index=255)
    assert data.known_classes is None
    assert task.outputs(data) == expected
    assert task.guessing_loss(data) == pytest.approx(math.log(expected))
    assert data.known_classes == data.num_classes == expected, "as other processes are told"
    assert Segmentation().outputs(custom("make_void_masks").load()) == 256, "where 255 does count"


def make_probabilities() -> tuple[TensorDataset, TensorDataset]:
    half = TensorDataset(torch.zeros(4, 6), torch.full((4, 3, 2), 1 / 3))
    return half, half


def test_the_target_of_an_item_may_be_class_probabilities() -> None:
    data = custom("make_probabilities").load()
    assert (data.input_shape, data.num_classes) == ((6,), 3)
    assert data.test.batch(torch.arange(2), None)[1].shape == (2, 3, 2)


@pytest.mark.parametrize(
    ("function", "kwargs", "message"),
    [
        ("make_nonsense", {}, r".*\.make_nonsense returned a dict of nothing, and train is missing; expected a DataSet, a .*"),
        ("make_half", {}, r".*\.make_half returned a dict of train, dev, and test is missing; expected .*"),
        ("make_four", {}, r".*\.make_four returned tuple of 4, expected a DataSet, a pair \(train, test\) or .*"),
        ("make_number", {}, r".*\.make_number returned int, expected a DataSet, a pair .*"),
        ("make_loader", {}, r".*\.make_loader returned DataLoader to train on, expected its dataset: batches are made .*"),
        (
            "make_numbers",
            {},
            r".*\.make_numbers returned int to train on, expected a map-style dataset .* or an iterable one .*",
        ),
        ("make_endless", {}, r".*\.make_endless returned count without a length to train on; give it a __len__, .*"),
        ("make_nothing", {}, r".*\.make_nothing returned an empty training set"),
        ("make_pair", {"size": 6}, r"'.*\.make_pair' takes \(.*\).*, not dataset\.size=6: .* argument 'size'"),
        ("no_such", {}, r"'.*\.no_such' cannot be imported: .* has no attribute 'no_such'"),
        ("SHARED", {}, r"'.*\.SHARED' is .*, expected a function or class"),
        (
            "make_pictures",
            {},
            r"the first item of .*: item\[0\] is a PosixPath, expected a tensor or numbers; .* dataset\.collate=.*",
        ),
    ],
)
def test_a_custom_function_that_does_not_work_is_one_clear_error(function: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^dataset\._target_: {message}$"):
        custom(function, **kwargs).load()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("make_bare_tensors", "makes a batch of type Tensor"),
        ("make_fractions", r"has the target tensor\(\[0\.5.*"),
        ("make_unlabelled", "makes a batch of type dict"),
    ],
)
def test_items_without_classes_are_refused_where_classes_are_wanted(function: str, message: str) -> None:
    data = custom(function).load()
    with pytest.raises(
        ValueError, match=rf"^dataset\._target_: the items of .* must be pairs .* to be classified; the first {message}$"
    ):
        _ = data.num_classes


@pytest.mark.parametrize("path", ["", "function", "my module.f", "module."])
def test_a_target_that_is_no_dotted_path_is_refused_before_any_import(path: str) -> None:
    with pytest.raises(ValueError, match=rf"^dataset\._target_: got '{path}', expected a dotted path such as .*$"):
        CustomData(_target_=path)
