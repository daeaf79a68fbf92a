"""Images of classes that can be learnt, for tests and benchmarks of GPUs: nothing has to be there or downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ormo_rpc.data import ArraySplit, DataSet

LIKE_CIFAR: Mapping[str, Any] = {"count": 12_800, "side": 32, "channels": 3, "augment": True}
"""Arguments of `images` for 200 batches of 64 with the form of CIFAR-10."""


def images(
    count: int = 512, side: int = 8, channels: int = 1, classes: int = 10, *, augment: bool = False, seed: int = 0
) -> DataSet:
    """A pattern for each class, under noise of twice its strength.

    Args:
        count: Training images; a quarter as many more are for testing.
        side: Pixels of a side.
        channels: Colours.
        classes: Classes, in equal shares.
        augment: Crop and flip training images at random.
        seed: Of the patterns and the noise.
    """
    drawn = torch.Generator().manual_seed(seed)
    shape = (channels, side, side)
    patterns = torch.randn(classes, *shape, generator=drawn)

    def split(number: int, *, augmented: bool) -> ArraySplit:
        labels = torch.arange(number) % classes
        noisy = patterns[labels] + 2 * torch.randn(number, *shape, generator=drawn)
        pixels = (128 + 24 * noisy).clamp(0, 255).to(torch.uint8)
        return ArraySplit(pixels, labels, scale=255, mean=(0.5,) * channels, std=(0.2,) * channels, augment=augmented)

    return DataSet(split(count, augmented=augment), split(count // 4, augmented=False), shape, classes)


def overrides(arguments: Mapping[str, Any]) -> list[str]:
    """The overrides of a run on such images."""
    return ["dataset._target_=benchmarks.gpu_images.images", *(f"+dataset.{key}={each}" for key, each in arguments.items())]
