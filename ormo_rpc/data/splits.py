"""Training and test samples: a `Split` turns sample numbers into a batch and keeps nothing between two batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor
from torch.utils.data import default_collate

PADDING = 4
"""Pixels that a random crop reaches beyond the image on each side."""


class Split(Protocol):
    """A numbered set of labelled samples.

    Attributes:
        PURE: Whether a batch depends on its arguments alone and on no other randomness, so that it may be made in any
            thread at any time.
    """

    PURE: ClassVar[bool]

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Inputs, shape (B, ...), and labels, int64 of shape (B,), of the samples numbered ``indices``, shape (B,).

        Training passes the generator of the augmentation; with None the samples come as they are, for evaluation.
        """
        ...


@runtime_checkable
class MapStyle(Protocol):
    """A map-style dataset of torch: any object with a length and items ``(input, label)``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class DataSet:
    """A problem of classification.

    Attributes:
        train: The samples that gradients are computed on.
        test: The samples that the accuracy is measured on.
        input_shape: The shape of one sample, without the batch.
        num_classes: Labels are 0 to ``num_classes - 1``.
    """

    train: Split
    test: Split
    input_shape: tuple[int, ...]
    num_classes: int


class ArraySplit:
    """Images kept in memory as bytes: a whole batch is augmented and normalised at once, and no process feeds it.

    Args:
        images: uint8, shape (N, C, H, W).
        labels: int64, shape (N,).
        scale: The largest pixel value, which becomes 1.0 before normalisation.
        mean: Per channel, of pixels in [0, 1].
        std: Per channel, of pixels in [0, 1].
        augment: Crop and flip at random wherever a generator is given.
    """

    PURE: ClassVar[bool] = True

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        scale: int,
        mean: Sequence[float],
        std: Sequence[float],
        augment: bool = False,
    ) -> None:
        self.images = images
        self.labels = labels
        self.scale = scale
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Normalised float32 images, shape (B, C, H, W), and their labels."""
        images = self.images[indices]
        if self.augment and generator is not None:
            images = crop_and_flip(images, generator)
        return (images.float() / self.scale - self.mean) / self.std, self.labels[indices]


class MapSplit:
    """Any map-style dataset; its items are put together by torch's ``default_collate``.

    Augmentation is left to the dataset. Its randomness must come from torch's global generator, which the worker seeds for
    every ticket: draws from elsewhere (``random``, numpy) are not repeatable.
    """

    PURE: ClassVar[bool] = False

    def __init__(self, dataset: MapStyle) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:  # noqa: ARG002 - see above
        """The items of these numbers, collated."""
        inputs, labels = default_collate([self.dataset[index] for index in indices.tolist()])
        return inputs, labels.long()  # cross entropy takes no other integers


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move every image by up to `PADDING` pixels over black and mirror every second one, each independently of the others.

    Args:
        images: Shape (B, C, H, W).
        generator: The only randomness: first the offsets down, then those to the right, then the flips, B of each.
    """
    size, _, height, width = images.shape
    down, right = torch.randint(0, 2 * PADDING + 1, (2, size, 1), generator=generator)
    flip = torch.randint(0, 2, (size, 1), generator=generator).bool()
    rows = down + torch.arange(height)  # (B, H): the rows of the padded image that are kept
    columns = right + torch.arange(width)
    columns = torch.where(flip, columns.flip(1), columns)
    padded = F.pad(images, (PADDING,) * 4).permute(0, 2, 3, 1)
    samples = torch.arange(size)
    return padded[samples[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
