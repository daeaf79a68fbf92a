"""The samples of a ticket: a function of its number and the seed, each sample once in an epoch."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ormo_rpc.data import Epochs
from ormo_rpc.seeding import generator


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


@pytest.mark.parametrize("size", [0, -3])
def test_a_batch_without_samples_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=rf"^batch_size: got {size}, expected a whole number >= 1$"):
        Epochs(10, size, seed=0)
