"""Iterable sets: a ticket has the same samples whatever was read before, and a set that breaks its word is refused."""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from typing_extensions import override

from ormo_rpc.data import DataSet, Epochs, IterableSplit, MapSplit
from ormo_rpc.data.checksum import checksum_of_labels
from ormo_rpc.data.held_out import hold_out
from ormo_rpc.errors import ConfigError
from ormo_rpc.seeding import seeded
from tests.support.datasets import Noisy
from tests.support.user_sets import Counting, DrawingAnOrder, DrawingSkipping, Skipping

LENGTH, BATCH = 11, 3
EPOCHS = Epochs(LENGTH, BATCH, seed=0, in_order=True)


def batch(split: IterableSplit, ticket: int) -> Any:
    return split.batch(EPOCHS.indices(ticket), None)


def passes(count: int) -> list[list[torch.Tensor]]:
    """The batches of tickets 0, 1, 2, ..., each pass read to its end in a process that reads nothing else."""
    found: list[list[torch.Tensor]] = []
    for epoch in range(count):
        split = IterableSplit(Counting(LENGTH))
        found += [batch(split, 4 * epoch + place) for place in range(4)]
    return found


EXPECTED = passes(3)


@given(st.lists(st.integers(0, 11), max_size=30), st.integers(0, 9))
def test_the_samples_of_a_ticket_do_not_depend_on_what_was_read_before(asked: list[int], other_seed: int) -> None:
    split = IterableSplit(Counting(LENGTH))
    random.seed(other_seed)
    torch.manual_seed(other_seed)
    for ticket in asked:
        inputs, targets = batch(split, ticket)
        assert torch.equal(inputs, EXPECTED[ticket][0])
        assert torch.equal(targets, EXPECTED[ticket][1])


class InShards(Counting):
    """A set that looks up its epoch at each of its shards."""

    @override
    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        for shard in range(0, self.length, 4):
            numbers = list(range(shard, min(shard + 4, self.length)))
            random.Random(self.epoch).shuffle(numbers)
            for number in numbers:
                yield torch.tensor([float(number)]), 100 * self.epoch + number


def test_a_pass_keeps_its_epoch_where_another_one_has_begun() -> None:
    split = IterableSplit(InShards(LENGTH))
    for ticket in [0, 1, 4, 2, 5, 8, 3, 6, 9, 7, 0]:  # as several workers ask, four tickets to an epoch
        found, alone = batch(split, ticket), batch(IterableSplit(InShards(LENGTH)), ticket)
        assert [each.tolist() for each in found] == [each.tolist() for each in alone]


def test_each_epoch_has_every_sample_once_and_an_order_of_its_own() -> None:
    epochs = [torch.cat([EXPECTED[4 * epoch + place][1] for place in range(4)]) for epoch in range(3)]
    assert [sorted((each - 100 * epoch).tolist()) for epoch, each in enumerate(epochs)] == [list(range(LENGTH))] * 3
    assert len({tuple((each % 100).tolist()) for each in epochs}) == 3
    assert [len(targets) for _, targets in EXPECTED[:4]] == [3, 3, 3, 2]


def test_a_split_without_randomness_has_the_batches_of_a_data_loader() -> None:
    plain = list(DataLoader(Skipping(LENGTH), batch_size=BATCH))
    split = IterableSplit(Skipping(LENGTH))
    for ticket in range(8):
        assert torch.equal(batch(split, ticket), plain[ticket % 4])


def test_the_seed_changes_the_draws() -> None:
    split = IterableSplit(Counting(LENGTH))
    split.seed = 1
    assert not torch.equal(batch(split, 0)[0], EXPECTED[0][0])


def test_global_generators_are_left_as_they_were() -> None:
    with seeded(0, "forward", 3):
        expected = random.random(), torch.rand(())
    with seeded(0, "forward", 3):
        batch(IterableSplit(Counting(LENGTH)), 2)
        assert (random.random(), torch.rand(())) == expected


def test_rising_tickets_go_on_with_one_pass() -> None:
    counting = Counting(LENGTH)
    split = IterableSplit(counting)
    for ticket in (0, 2, 3):
        batch(split, ticket)
    assert (counting.passes, counting.read, counting.closed) == (1, LENGTH, 1)
    batch(split, 4)  # the next epoch
    assert counting.passes == 2


def test_workers_of_one_process_that_are_at_different_places_do_not_begin_again_and_again() -> None:
    counting = Counting(LENGTH)
    split = IterableSplit(counting)
    for ticket in (2, 0, 3, 1, 6, 4, 7, 5):
        batch(split, ticket)
    assert counting.passes == 4  # two of each epoch
    for ticket in range(24):
        batch(split, ticket)
    split.close()
    assert counting.closed == counting.passes


def test_a_set_that_can_skip_begins_and_goes_on_where_it_is_to() -> None:
    skipping = Skipping(1000)
    split = IterableSplit(skipping)
    assert split.batch(torch.tensor([500, 501, 900]), None).tolist() == [500, 501, 900]
    assert skipping.begun == [499]
    assert split.batch(torch.tensor([2, 999]), None).tolist() == [2, 999]
    assert skipping.begun == [499, 1]


@pytest.mark.parametrize(
    "make",
    [
        DrawingAnOrder,
        functools.partial(DrawingSkipping, late=False),
        functools.partial(DrawingSkipping, late=True),
    ],
)
def test_a_set_that_skips_draws_what_it_draws_without_skipping(make: Callable[[int], Any]) -> None:
    whole = IterableSplit(make(LENGTH))
    expected = [[each.item() for each in whole.batch(torch.tensor([number]), None)] for number in range(2 * LENGTH)]
    assert len({drawn for _, drawn in expected}) == 2 * LENGTH
    for number, sample in enumerate(expected):
        split = IterableSplit(make(LENGTH))
        for asked in {number, min(number + 3, 2 * LENGTH - 1)}:
            assert [each.item() for each in split.batch(torch.tensor([asked]), None)] == expected[asked], number
        assert [each.item() for each in split.batch(torch.tensor([number]), None)] == sample  # which lies behind now


def test_one_sample_may_be_read_again_at_once() -> None:
    counting = Counting(LENGTH)
    split = IterableSplit(counting)
    for count in (1, 3):  # an evaluation looks at one first
        split.batch(torch.arange(count), None)
    assert counting.passes == 1


@pytest.mark.parametrize(("yields", "what"), [(9, "ended after 9 samples"), (12, "goes on after them")])
def test_a_set_of_another_length_than_it_says_is_refused(yields: int, what: str) -> None:
    split = IterableSplit(Counting(LENGTH, yields))
    batch(split, 4)
    message = rf"^dataset: Counting has the length 11, but {what} in epoch 1; its __len__ must be the number of samples .*$"
    for _ in range(2):  # and again, wherever its batch is computed next
        with pytest.raises(ConfigError, match=message):
            batch(split, 7)


class Once(Skipping):
    """An iterator that has a length."""

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> int:
        raise StopIteration


def test_an_iterator_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^dataset: Once is an iterator, which is read once; expected a set whose __iter__ .*$"
    ):
        batch(IterableSplit(Once(LENGTH)), 0)


class Failing(Counting):
    """A set whose source fails once."""

    failed = False

    def __iter__(self) -> Any:
        for item in super().__iter__():
            if item[1] % 100 == 3 and not self.failed:
                self.failed = True
                raise OSError("the line was cut")
            yield item


def test_a_pass_that_has_failed_is_begun_again() -> None:
    split = IterableSplit(Failing(LENGTH))
    with pytest.raises(OSError, match="cut"):
        split.batch(torch.arange(LENGTH), None)
    assert torch.equal(batch(split, 0)[0], EXPECTED[0][0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_a_forked_process_reads_for_itself() -> None:
    split = IterableSplit(Counting(LENGTH))
    batch(split, 0)
    pid = os.fork()
    if pid == 0:
        same = torch.equal(batch(split, 1)[0], EXPECTED[1][0])
        os._exit(0 if same and split.dataset.passes == 2 else 1)  # pyright: ignore[reportAttributeAccessIssue] # is a Counting
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    batch(split, 1)
    assert split.dataset.passes == 1  # pyright: ignore[reportAttributeAccessIssue] # as above


def test_the_checksum_reads_the_first_samples_and_leaves_nothing_open() -> None:
    counting = Counting(100)
    data = DataSet(IterableSplit(counting), MapSplit(Noisy()))
    found = checksum_of_labels(data, 0)
    assert (counting.read, counting.passes, counting.closed) == (16, 1, 1)
    assert found == checksum_of_labels(data, 0)
    counting.epoch = 5
    assert found == checksum_of_labels(data, 0)


def test_what_would_need_another_order_is_refused() -> None:
    split = IterableSplit(Counting(LENGTH))
    with pytest.raises(ValueError, match=r"^dataset\.validation: got 0\.1, expected 0: an iterable set is read in its own .*$"):
        hold_out(DataSet(split, split), 0.1, torch.Generator())
    with pytest.raises(ValueError, match=r"^dataset\.weights: got weights of an iterable set, expected none: .*$"):
        DataSet(split, split, weights=torch.ones(LENGTH))
