"""The forms that a user's function may return: pairs, triples and mappings, rows as Hugging Face has them, iterable sets."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch.utils.data import DataLoader

from ormo_rpc.config.parsing import parse_config, parse_text
from ormo_rpc.data import CustomData, IterableSplit, MapSplit
from ormo_rpc.data.checksum import checksum_of_labels
from ormo_rpc.data.collate import default
from tests.support.datasets import Noisy
from tests.support.user_sets import Counting, Rows

TOKENS = [[5, 6, 7], [8], [9, 9], [1, 2], [3]]


def rows(**columns: Any) -> Rows:
    return Rows({"text": [str(each) for each in TOKENS], "input_ids": TOKENS, "label": [0, 1, 2, 1, 0], **columns})


def make_rows(**further: Any) -> dict[str, Rows]:
    return {"train": rows(**further), "test": rows(), "validation": rows(), "unsupervised": rows()}


class OfClasses:
    """The feature of a column that has classes."""

    num_classes = 5


def make_described() -> dict[str, Rows]:
    made = make_rows()
    made["train"].features = {"label": OfClasses()}  # pyright: ignore[reportAttributeAccessIssue] # as there
    return made


def make_own_form() -> tuple[Rows, Rows]:
    return rows().with_format("torch"), rows()


def make_texts() -> tuple[Rows, Rows]:
    only = Rows({"text": ["a", "b"], "file": ["c", "d"]})
    return only, only


def make_triple() -> tuple[Noisy, Noisy, Noisy]:
    return Noisy(6), Noisy(2), Noisy(3)


def make_iterable() -> tuple[Counting, Counting]:
    return Counting(7), Counting(3)


def by_length(items: list[dict[str, Any]]) -> torch.Tensor:
    return torch.tensor([len(item["input_ids"]) for item in items])


def custom(function: str, **values: Any) -> CustomData:
    config = parse_config({"workers": 1, "dataset": {"_target_": f"{__name__}.{function}", **values}})
    assert config.dataset == parse_text(config.yaml).dataset  # as other processes read it
    return cast("CustomData", config.dataset)


def test_rows_are_padded_and_their_texts_left_out(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    data = custom("make_rows", collate="pad").load()
    assert caplog.messages == [
        "not used of the data set: unsupervised",
        *(f"columns of the {role} set that are no numbers, and are left out: text" for role in ("train", "test", "validation")),
    ]
    batch = data.train.batch(torch.tensor([0, 3]), None)
    assert {name: each.tolist() for name, each in batch.items()} == {
        "input_ids": [[5, 6, 7], [1, 2, 0]],
        "label": [0, 1],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
    }
    assert data.validation is not None
    assert data.num_classes == 3


def test_rows_make_the_batches_of_a_data_loader() -> None:
    even = [[1, 2]] * 5
    plain = rows(input_ids=even).with_format("torch", columns=["input_ids", "label"])
    train = custom("make_rows", input_ids=even).load().train
    for indices, expected in zip(torch.arange(5).split(2), DataLoader(cast("Any", plain), batch_size=2), strict=True):
        torch.testing.assert_close(train.batch(indices, None), expected, rtol=0, atol=0)


def test_the_number_of_classes_may_be_among_the_features() -> None:
    assert custom("make_described", collate="pad").load().num_classes == 5


def test_rows_with_a_form_of_the_users_own_keep_it() -> None:
    message = r"^dataset\._target_: the first item of .* makes no batch: item\['text'\] is a str, expected .*$"
    with pytest.raises(ValueError, match=message):
        custom("make_own_form").load()


def test_rows_without_numbers_are_refused() -> None:
    message = (
        r"^dataset\._target_: .*\.make_texts returned a dataset to train on none of whose columns has numbers: text, file$"
    )
    with pytest.raises(ValueError, match=message):
        custom("make_texts").load()


def test_a_collate_function_is_named_by_its_path() -> None:
    data = custom("make_rows", collate=f"{__name__}.by_length").load()
    assert data.test.batch(torch.arange(5), None).tolist() == [3, 1, 2, 2, 1]


def test_functions_may_be_given_as_they_are() -> None:
    assert custom("make_rows", collate=by_length) == custom("make_rows", collate=f"{__name__}.by_length")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"collate": "padding"}, r"collate: got 'padding', expected default, pad, or a dotted path such as .*"),
        ({"collate": "no_such.function"}, r"collate: 'no_such\.function' cannot be imported: .*"),
        ({"pad_values": {"x": 1}}, r"pad_values: got values with dataset\.collate=default, expected dataset\.collate=pad"),
        ({"collate": "pad", "pad_values": 3}, r"pad_values: got 3, expected keys with their values"),
    ],
)
def test_a_collate_that_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^dataset\.{message}$"):
        custom("make_rows", **values).load()


def test_of_a_triple_the_third_is_for_validation() -> None:
    data = custom("make_triple").load()
    assert [len(each) for each in (data.train, data.test, data.validation) if each is not None] == [6, 2, 3]


def test_an_iterable_set_is_read_in_order_and_nothing_is_left_open() -> None:
    data = custom("make_iterable").load_splits(4)
    assert isinstance(data.train, IterableSplit)
    assert isinstance(data.test, IterableSplit)
    assert (data.train.seed, data.test.seed) == (4, 0)
    assert data.input_shape == (2,)
    assert cast("Counting", data.train.dataset).closed == 1
    assert sorted(data.test.batch(torch.arange(3), None)[1].tolist()) == [0, 1, 2]
    assert data.num_classes == 7


def test_splits_may_stand_beside_datasets() -> None:
    train = custom("make_with_split", collate="pad").load().train
    assert isinstance(train, MapSplit)
    assert train.collate is default


def make_with_split() -> tuple[Any, Noisy]:
    return MapSplit(Noisy(5), default), Noisy()


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"label": [0, 1, 2, 1, 1]}, False),
        ({"input_ids": [[5, 6], *TOKENS[1:]]}, True),
        ({"score": [0.5] * 5}, True),
    ],
)
def test_the_checksum_of_rows_is_that_of_their_labels(change: dict[str, Any], same: bool) -> None:
    first, other = (custom("make_rows", collate="pad", **each).load() for each in ({}, change))
    assert (checksum_of_labels(first, 0) == checksum_of_labels(other, 0)) is same
