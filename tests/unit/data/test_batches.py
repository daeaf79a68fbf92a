"""Batches: normalised, augmented from the ticket's generator alone, and collated in the order asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ormo_rpc.data import ArraySplit, MapSplit
from ormo_rpc.seeding import generator
from tests.support.datasets import Noisy, images


def split(pixels: Tensor, *, augment: bool) -> ArraySplit:
    """Pixels as they are: neither scaled nor shifted."""
    nothing, one = [0.0] * pixels.shape[1], [1.0] * pixels.shape[1]
    return ArraySplit(pixels, torch.arange(len(pixels)), scale=1, mean=nothing, std=one, augment=augment)


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


def test_a_map_style_dataset_is_collated_in_the_order_asked_for() -> None:
    torch.manual_seed(0)
    noise = torch.stack([torch.rand(()) for _ in range(3)])
    torch.manual_seed(0)
    inputs, labels = MapSplit(Noisy()).batch(torch.tensor([5, 0, 3]), None)
    assert torch.equal(inputs[:, 1, 2], torch.tensor([5.0, 0.0, 3.0]) + noise)
    assert inputs.shape == (3, 2, 3)
    assert labels.dtype == torch.int64
    assert labels.tolist() == [1, 0, 3]
