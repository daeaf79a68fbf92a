"""Splits that can be on a device: their batches are those of the numbers that were drawn."""

from __future__ import annotations

import pytest
import torch

from ormo_rpc.data import ArraySplit, DataSet, Resident
from ormo_rpc.data.held_out import hold_out
from ormo_rpc.seeding import generator


def images(*, augment: bool) -> ArraySplit:
    drawn = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (20, 3, 8, 8), generator=drawn, dtype=torch.uint8)
    return ArraySplit(pixels, torch.arange(20), scale=255, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), augment=augment)


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("held_out", [0, 5])
def test_a_batch_is_made_of_the_numbers_that_were_drawn_alone(augment: bool, held_out: int) -> None:
    whole = DataSet(images(augment=augment), images(augment=False))
    data = hold_out(whole, held_out, generator(0, "validation", 0)).train
    assert isinstance(data, Resident)
    assert data.num_bytes == 20 * 3 * 8 * 8 + 20 * 8
    indices = torch.tensor([4, 0, 9])
    there = data.to(torch.device("cpu"))
    made = there.make(data.draws(indices, generator(0, "augment", 7)))
    batch = data.batch(indices, generator(0, "augment", 7))
    assert all(torch.equal(one, other) for one, other in zip(made, batch, strict=True))
    plain, _ = data.batch(indices, None)
    assert torch.equal(plain, there.make(data.draws(indices, None))[0])
    assert torch.equal(plain, batch[0]) == (not augment)
