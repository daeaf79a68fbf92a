"""Weights of training samples: drawn as torch's ``WeightedRandomSampler`` draws, the same in every process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset, WeightedRandomSampler

from ormo_rpc.config.parsing import parse_config, parse_text
from ormo_rpc.data import DataSet, Epochs, MapSplit
from ormo_rpc.data.checksum import checksum_of_labels
from ormo_rpc.data.held_out import hold_out
from ormo_rpc.runtimes.job import Job
from ormo_rpc.seeding import generator

WEIGHTS = torch.tensor([1.0, 0.0, 3.0, 0.5, 0.5, 5.0])
COUNT = len(WEIGHTS)


class Weighted(TensorDataset):
    """A user's dataset with weights as an attribute."""

    weights = WEIGHTS.tolist()


def make() -> tuple[Weighted, Weighted]:
    half = Weighted(torch.arange(COUNT).view(-1, 1).float(), torch.arange(COUNT))
    return half, half


def make_data_set() -> DataSet:
    half = MapSplit(make()[0])
    return DataSet(half, half, (1,), COUNT, weights=WEIGHTS)


def of_labels(train: Any) -> torch.Tensor:
    return WEIGHTS[torch.stack([label for _, label in train])]


def of_split(train: Any) -> torch.Tensor:
    return WEIGHTS.flip(0)[: len(train)]


def job(function: str, **values: Any) -> Job:
    target = {"_target_": f"{__name__}.{function}", **values}
    return Job(parse_config({"workers": 2, "seed": 3, "train": {"batch_size": 4}, "dataset": target}))


@pytest.mark.parametrize("epoch", [0, 7])
def test_an_epoch_has_the_samples_of_torch_s_weighted_sampler(epoch: int) -> None:
    epochs = Epochs(COUNT, 4, seed=5, weights=WEIGHTS.double())
    sampler = WeightedRandomSampler(WEIGHTS.tolist(), COUNT, replacement=True, generator=generator(5, "order", epoch))
    first = epoch * epochs.batches_per_epoch
    assert torch.cat([epochs.indices(first + place) for place in range(2)]).tolist() == list(sampler)


def test_samples_come_as_often_as_their_weights_say() -> None:
    weights = WEIGHTS.double().repeat(500)
    epochs = Epochs(len(weights), len(weights), seed=0, weights=weights)
    counts = torch.cat([epochs.indices(epoch) % COUNT for epoch in range(10)]).bincount(minlength=COUNT)
    expected = 30_000 * WEIGHTS / WEIGHTS.sum()
    assert counts[1] == 0
    # Counts are binomial: standard deviations of at most sqrt(30,000 / 4) = 87.
    assert (counts - expected).abs().max() < 4 * 87


@pytest.mark.parametrize(
    ("function", "values"),
    [
        ("make", {"weights": "weights"}),
        ("make", {"weights": f"{__name__}.of_labels"}),
        ("make_data_set", {}),
    ],
)
def test_weights_come_from_an_attribute_a_function_or_the_data_set(function: str, values: dict[str, Any]) -> None:
    first = job(function, **values)
    again = Job(parse_text(first.config.yaml))
    plain = job("make")
    sampler = WeightedRandomSampler(WEIGHTS.tolist(), COUNT, generator=generator(3, "order", 1))
    drawn = torch.cat([first.epochs.indices(ticket) for ticket in (2, 3)])
    assert drawn.tolist() == list(sampler)
    assert drawn.tolist() == torch.cat([again.epochs.indices(ticket) for ticket in (2, 3)]).tolist()
    checksums = [checksum_of_labels(each.data, 3) for each in (first, again, plain)]
    assert checksums[0] == checksums[1] != checksums[2]


def test_a_function_replaces_the_weights_of_a_data_set() -> None:
    weights = job("make_data_set", weights=f"{__name__}.of_split").data.weights
    assert weights is not None
    assert weights.tolist() == WEIGHTS.flip(0).tolist()


def test_weights_follow_the_samples_that_are_not_held_out() -> None:
    half = MapSplit(make()[0])
    data = hold_out(DataSet(half, half, weights=WEIGHTS), 2, torch.Generator().manual_seed(1))
    assert data.weights is not None
    assert data.weights.tolist() == WEIGHTS[data.train.batch(torch.arange(4), None)[1]].tolist()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 2.0], r"got the shape \(2,\), expected \(6,\): one for each training sample"),
        (torch.ones(6, 1), r"got the shape \(6, 1\), expected \(6,\): .*"),
        ([1, 1, 1, 1, 1, -0.5], r"got -0\.5, expected finite numbers >= 0"),
        ([1, 1, 1, 1, 1, float("nan")], r"got nan, expected finite numbers >= 0"),
        ([1, 1, 1, 1, 1, float("inf")], r"got inf, expected finite numbers >= 0"),
        ([0] * 6, r"got zeros alone, expected at least one weight > 0"),
        ("heavy", r"got str, expected a tensor of 6 weights: .*"),
    ],
)
def test_weights_that_nothing_can_be_drawn_by_are_refused(weights: Any, message: str) -> None:
    half = MapSplit(make()[0])
    with pytest.raises(ValueError, match=rf"^dataset\.weights: {message}$"):
        DataSet(half, half, weights=weights)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("heaviness", r"Weighted has no attribute 'heaviness'; expected the name of one .*"),
        ("no_such.thing", r"'no_such\.thing' cannot be imported: .*"),
        ("not a name", r"got 'not a name', expected a dotted path such as .*, or the name of an attribute"),
    ],
)
def test_weights_that_are_not_found_are_refused(weights: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^dataset\.weights: {message}$"):
        job("make", weights=weights)
