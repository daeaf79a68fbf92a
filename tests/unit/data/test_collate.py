"""Batches of the items of a user's data set: those of a `DataLoader`, padded ones, and errors that name the column."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from ormo_rpc.data import MapSplit, Pad
from ormo_rpc.data.collate import default
from tests.support.datasets import Noisy

TEXTS = [[5, 6, 7], [8], [], [1, 2]]


class Pair(NamedTuple):
    """An item with names."""

    inputs: Any
    targets: Any


@dataclasses.dataclass
class Item:
    """An item with names, of a class of its own."""

    tokens: torch.Tensor
    label: int


@pytest.mark.parametrize(
    "dataset",
    [
        TensorDataset(torch.rand(9, 2), torch.arange(9)),
        Subset(TensorDataset(torch.rand(12, 2), torch.arange(12)), range(9)),
        [{"x": torch.full((2,), float(place)), "y": {"z": place, "w": np.ones(3) * place}} for place in range(9)],
        [Pair(torch.rand(3), 0.5) for _ in range(9)],
        torch.rand(9, 4),
    ],
)
def test_batches_are_those_of_a_data_loader(dataset: Any) -> None:
    split = MapSplit(dataset)
    batches = [split.batch(indices, None) for indices in torch.arange(9).split(4)]
    for ours, plain in zip(batches, DataLoader(dataset, batch_size=4), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=0)
        assert type(ours) is type(plain)


def test_a_collate_function_makes_the_batch() -> None:
    assert MapSplit(Noisy(), lambda items: [label for _, label in items]).batch(torch.tensor([5, 2]), None) == [1, 2]


class Together(Dataset[int]):
    """A dataset that can fetch several items at once."""

    def __len__(self) -> int:
        return 9

    def __getitems__(self, indices: list[int]) -> list[int]:
        return [10 * index for index in indices]


def test_items_are_fetched_together_where_the_dataset_can() -> None:
    assert MapSplit(Together()).batch(torch.tensor([3, 1]), None).tolist() == [30, 10]


@pytest.mark.parametrize("collate", [default, Pad()])
@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"x": torch.zeros(2), "text": "hello"}, r"item\['text'\] is a str"),
        ({"x": torch.zeros(2), "meta": {"file": Path()}}, r"item\['meta'\]\['file'\] is a PosixPath"),
        ({"x": None}, r"item\['x'\] is None"),
        ((torch.zeros(2), "cat"), r"item\[1\] is a str"),
        ({"x": np.array(["a"])}, r"item\['x'\] is a ndarray"),
    ],
)
def test_what_is_no_number_is_named(collate: Any, item: Any, message: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^{message}, expected a tensor or numbers; .* dataset\.collate=my_module\.my_function$"
    ):
        collate([item, item])


def test_items_of_different_shapes_are_refused_with_the_remedy() -> None:
    with pytest.raises(
        ValueError, match=r"^items have different shapes \(.*\[3\].*\[2\].*\); dataset\.collate=pad pads them .*$"
    ):
        default([(torch.zeros(3), 1), (torch.zeros(2), 0)])


def test_columns_of_different_lengths_are_padded_and_masked() -> None:
    items = [{"input_ids": text, "labels": text, "weight": 0.5} for text in TEXTS]
    batch = Pad()(items)
    assert list(batch) == ["input_ids", "labels", "weight", "attention_mask"]
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0], [0, 0, 0], [1, 2, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, -100, -100], [-100, -100, -100], [1, 2, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]]
    assert [each.dtype for each in batch.values()] == [torch.int64, torch.int64, torch.float32, torch.int64]


def test_all_that_a_target_holds_is_padded_as_targets_are() -> None:
    texts = [[1, 2], [3]]
    for items in ([({"x": each}, {"tags": each}) for each in texts], [(each, (each, each)) for each in texts]):
        _, targets = Pad()(items)
        parts = targets.values() if isinstance(targets, dict) else targets
        assert [each.tolist() for each in parts] == [[[1, 2], [3, -100]]] * len(parts)
    batch = Pad()([{"x": each, "labels": {"tags": each}} for each in texts])
    assert batch["labels"]["tags"].tolist() == [[1, 2], [3, -100]]
    batch = Pad()([{"x": each, "labels": {"tags": each, "attention_mask": [1] * len(each)}} for each in texts])
    assert batch["labels"]["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["x"].tolist() == [[1, 2], [3, 0]]


@given(st.lists(st.lists(st.integers(1, 9), max_size=7), min_size=1, max_size=6), st.sampled_from([torch.int32, torch.float64]))
def test_padding_is_that_of_torch(texts: list[list[int]], dtype: torch.dtype) -> None:
    tensors = [torch.tensor(text, dtype=dtype) for text in texts]
    inputs, targets = Pad()([(each, each) for each in tensors])
    assert inputs.dtype == targets.dtype == dtype
    assert torch.equal(inputs, nn.utils.rnn.pad_sequence(tensors, batch_first=True))
    value = math.nan if dtype.is_floating_point else -100
    torch.testing.assert_close(
        targets, nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value), rtol=0, atol=0, equal_nan=True
    )


def test_a_mask_of_the_items_is_kept_and_padded_with_zeros() -> None:
    batch = Pad()([{"input_ids": [4, 4], "attention_mask": [1, 0]}, {"input_ids": [4], "attention_mask": [1]}])
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 0]]


def test_a_mask_is_there_also_where_nothing_is_padded_and_none_where_nothing_has_a_length() -> None:
    assert Pad()([{"x": [1.0, 2.0], "label": 1}])["attention_mask"].tolist() == [[1, 1]]
    assert list(Pad()([{"x": 1.0, "labels": [1, 2]}])) == ["x", "labels"]


def test_values_of_columns_may_be_set() -> None:
    pad = Pad({"input_ids": 50_256, "labels": -1})
    batch = pad([{"input_ids": [1, 2], "labels": [1, 2], "kind": [7, 7]}, {"input_ids": [3], "labels": [3], "kind": [7]}])
    assert [batch[name][1].tolist() for name in ("input_ids", "labels", "kind")] == [[3, 50_256], [3, -1], [7, 0]]
    assert Pad({"0": 9})([(torch.tensor([1, 2]), 0), (torch.tensor([3]), 1)])[0].tolist() == [[1, 2], [3, 9]]


def test_every_dimension_is_padded() -> None:
    batch, sizes = Pad()([(torch.ones(2, 3, dtype=torch.bool), [2, 3]), (torch.ones(3, 1, dtype=torch.bool), [3, 1])])
    assert batch.dtype == torch.bool
    assert [each.sum().item() for each in batch] == [6, 3]
    assert batch.shape == (2, 3, 3)
    assert sizes.tolist() == [[2, 3], [3, 1]]


def test_named_tuples_dataclasses_and_bare_tensors_keep_their_kind() -> None:
    pair = Pad()([Pair([1, 2], [3, 4]), Pair([5], [6])])
    assert isinstance(pair, Pair)
    assert (pair.inputs.tolist(), pair.targets.tolist()) == ([[1, 2], [5, 0]], [[3, 4], [6, -100]])
    made = Pad()([Item(torch.tensor([1, 2]), 3), Item(torch.tensor([4]), 5)])
    assert isinstance(made, Item)
    assert (made.tokens.tolist(), torch.as_tensor(made.label).tolist()) == ([[1, 2], [4, 0]], [3, 5])
    assert Pad()([torch.tensor([1.0, 2.0]), torch.tensor([4.0])]).tolist() == [[1, 2], [4, 0]]
    assert Pad()([torch.tensor([1, 2]), torch.tensor([4])]).tolist() == [[1, 2], [4, -100]]  # tokens, which are targets
    assert Pad({"0": 7})([torch.tensor([1, 2]), torch.tensor([4])]).tolist() == [[1, 2], [4, 7]]
    pictures = [torch.ones(1, 2, dtype=torch.uint8), torch.ones(2, 1, dtype=torch.uint8)]
    assert Pad()(pictures).tolist() == [[[1, 1], [0, 0]], [[1, 0], [1, 0]]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int16])
def test_targets_of_a_dtype_without_the_padding_are_widened(dtype: torch.dtype) -> None:
    masks = [torch.ones(1, 2, dtype=dtype), torch.ones(1, 1, dtype=dtype)]
    _, targets = Pad()([(each, each) for each in masks])
    assert targets.tolist() == [[[1, 1]], [[1, -100]]]
    assert targets.dtype == (torch.int16 if dtype == torch.int16 else torch.int64)


def test_inner_parts_are_padded_too() -> None:
    inputs, label = Pad()([(({"a": [1, 2]}, [3]), 0), (({"a": [1]}, [3, 4]), 1)])
    assert (inputs[0]["a"].tolist(), inputs[1].tolist(), label.tolist()) == ([[1, 2], [1, 0]], [[3, 0], [3, 4]], [0, 1])


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([{"x": 1}, {"y": 1}], r"items have the columns \['x'\] and \['y'\], expected the same in all"),
        ([(1, 2), (1, 2, 3)], r"items have 2 and 3 parts, expected as many in all"),
        ([{"x": [[1, 2], [3]]}], r"no batch can be made of 'x' of the items: .*"),
        (
            [{"x": torch.ones(2)}, {"x": torch.ones(2, 2)}],
            r"no batch can be made of 'x' of the items: the shapes are \[\(2,\), \(2, 2\)\], expected as many dimensions .*",
        ),
        ([{"x": [1, 2]}, {"x": ["a"]}], r"no batch can be made of 'x' of the items: .*"),
    ],
)
def test_items_of_different_forms_are_refused(items: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{message}$"):
        Pad()(items)


def test_a_value_that_is_no_whole_number_is_no_padding_of_integers() -> None:
    with pytest.raises(ValueError, match=r"'x' of the items: the padding is 0\.5, expected a whole number for torch\.int64$"):
        Pad({"x": 0.5})([{"x": [1]}, {"x": [1, 2]}])
