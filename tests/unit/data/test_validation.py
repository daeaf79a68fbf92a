"""The validation split: disjoint from training, a function of the run's seed alone, without augmentation."""

from __future__ import annotations

import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from ormo_rpc.config.parsing import parse_config, parse_text
from ormo_rpc.data import ArraySplit, DataSet, MapSplit
from ormo_rpc.data.held_out import hold_out
from ormo_rpc.runtimes.job import Job
from ormo_rpc.seeding import generator
from tests.support.datasets import Noisy, images

COUNT = 40


def numbered(*, augment: bool = False) -> DataSet:
    """A data set in which each image has its own number as its label."""
    split = ArraySplit(images(COUNT, 1, 8), torch.arange(COUNT), scale=255, mean=(0.0,), std=(1.0,), augment=augment)
    return DataSet(split, split, (1, 8, 8), COUNT)


def with_its_own() -> DataSet:
    half = MapSplit(Noisy())
    return DataSet(half, half, (2, 3), 4, half)


def noisy_pair(validation: float = 0.0) -> tuple[Noisy, Noisy]:
    return Noisy(6 if validation == 0 else 3), Noisy(2)


def noisy() -> tuple[Noisy, Noisy]:
    return Noisy(6), Noisy(2)


def labels(data: DataSet, *, validation: bool) -> list[int]:
    split = data.validation if validation else data.train
    assert split is not None
    return split.batch(torch.arange(len(split)), None)[1].tolist()


@pytest.mark.parametrize(("amount", "size"), [(0.25, 10), (10, 10), (0.99, 40), (1, 1), (1e-9, 1), (39, 39)])
def test_training_and_validation_samples_are_the_whole_training_set(amount: float, size: int) -> None:
    if size == COUNT:
        with pytest.raises(ValueError, match=r"^dataset\.validation: got 0\.99, expected less than the 40 training samples$"):
            hold_out(numbered(), amount, torch.Generator())
        return
    data = hold_out(numbered(), amount, torch.Generator())
    held_out, rest = labels(data, validation=True), labels(data, validation=False)
    assert (len(held_out), len(rest)) == (size, COUNT - size)
    assert sorted(held_out + rest) == list(range(COUNT))
    assert data.train.PURE
    assert labels(data, validation=True) == held_out


@pytest.mark.parametrize("amount", [40, 1e9])
def test_a_split_that_leaves_no_training_sample_is_refused(amount: float) -> None:
    message = rf"^dataset\.validation: got {re.escape(f'{amount:g}')}, expected less than the 40 training samples$"
    with pytest.raises(ValueError, match=message):
        hold_out(numbered(), amount, torch.Generator())


def test_held_out_images_are_not_augmented_while_training_images_are() -> None:
    data = hold_out(numbered(augment=True), 30, torch.Generator().manual_seed(0))
    whole = numbered().train

    def batch(split: Any) -> tuple[Tensor, Tensor]:
        return split.batch(torch.arange(10), generator(0, "augment", 0))

    for split, same in ((data.validation, True), (data.train, False)):
        inputs, numbers = batch(split)
        assert torch.equal(inputs, whole.batch(numbers, None)[0]) is same


DIFFERENT: list[dict[str, Any]] = [
    {"algorithm": "asgd", "workers": 2},
    {"algorithm": "orlomo", "workers": 7, "scheduler": "sync"},
    {"algorithm": "fedbuff", "runtime": "sim", "train": {"batch_size": 5}},
]


def job(seed: int, values: dict[str, Any], validation: float = 0.1) -> Job:
    return Job(parse_config({"workers": 3, "seed": seed, "dataset": {"name": "digits", "validation": validation}, **values}))


def test_the_split_depends_on_the_seed_alone() -> None:
    first, *others = (job(0, values) for values in DIFFERENT)
    assert first.data.validation is not None
    assert (len(first.data.validation), len(first.data.train)) == (144, 1293)
    again = Job(first.config)
    everything = torch.arange(144)
    for other in (*others, again):
        assert other.data.validation is not None
        assert torch.equal(other.data.validation.batch(everything, None)[0], first.data.validation.batch(everything, None)[0])
    different = job(1, DIFFERENT[0]).data.validation
    assert different is not None
    assert not torch.equal(different.batch(everything, None)[0], first.data.validation.batch(everything, None)[0])


def test_epochs_count_the_remaining_samples() -> None:
    assert job(0, {"algorithm": "asgd"}, validation=0.0).batches_per_epoch == 45  # 1437 = 44 * 32 + 29
    assert job(0, {"algorithm": "asgd"}).batches_per_epoch == 41  # 1293 = 40 * 32 + 13


def test_without_a_validation_split_nothing_changes() -> None:
    data = numbered()
    assert hold_out(data, 0.0, torch.Generator()) is data


def test_a_data_set_may_have_a_validation_split_of_its_own() -> None:
    config = {"workers": 1, "dataset": {"_target_": f"{__name__}.with_its_own"}}
    assert Job(parse_config(config)).data.validation is not None
    with pytest.raises(
        ValueError, match=r"^dataset\.validation: got 2, expected 0: the data set has a validation split of its own$"
    ):
        Job(parse_config({"workers": 1, "dataset": {"_target_": f"{__name__}.with_its_own", "validation": 2}}))


@pytest.mark.parametrize(
    ("function", "train", "validation"),
    [("noisy", 4, 2), ("noisy_pair", 3, None)],  # the second takes the keyword itself
)
def test_of_a_function_of_the_users_own_samples_are_held_out_unless_it_takes_the_keyword(
    function: str, train: int, validation: int | None
) -> None:
    config = parse_config({"workers": 1, "dataset": {"_target_": f"{__name__}.{function}", "validation": 2}})
    for each in (config, parse_text(config.yaml)):  # as the launcher has it, and as its processes read it
        data = Job(each).data
        assert len(data.train) == train
        assert (None if data.validation is None else len(data.validation)) == validation


def drawn() -> tuple[TensorDataset, TensorDataset]:
    inputs = np.random.rand(8, 3) + random.random()
    half = TensorDataset(torch.from_numpy(inputs) + torch.rand(()), torch.arange(8))
    return half, half


def test_a_data_set_that_draws_from_the_global_generators_is_the_same_in_every_process_and_run() -> None:
    found: list[Tensor] = []
    for seed in (0, 1):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        config = parse_config({"workers": 1, "seed": seed, "dataset": {"_target_": f"{__name__}.drawn"}})
        found.append(Job(config).data.test.batch(torch.arange(8), None)[0])
    assert torch.equal(*found)
