"""Training, validation and test samples: a `Split` turns sample numbers into a batch and keeps nothing between two batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch

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

    def batch(self, indices: torch.Tensor, generator: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs, shape (B, ...), and targets of the samples numbered ``indices``, shape (B,).

        Targets are class numbers, integers of shape (B, ...), of which -100 does not count; or class probabilities, floating
        point of the shape of the logits (B, C, ...).

        Training passes the generator of the augmentation; with None the samples come as they are, for evaluation.
        """
        ...


@runtime_checkable
class MapStyle(Protocol):
    """A map-style dataset of torch: any object with a length and items ``(input, target)``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class DataSet:
    """A problem of classification.

    Attributes:
        train: The samples that gradients are computed on.
        test: The samples that the accuracy is measured on.
        validation: The samples for choices between runs, such as of a learning rate; None where there are none.
        input_shape: The shape of one sample, without the batch.
        num_classes: Targets are 0 to ``num_classes - 1``.
    """

    train: Split
    test: Split
    input_shape: tuple[int, ...]
    num_classes: int
    validation: Split | None = None


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
        images: torch.Tensor,
        labels: torch.Tensor,
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

    def batch(self, indices: torch.Tensor, generator: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised float32 images, shape (B, C, H, W), and their labels."""
        images = self.images[indices]
        if self.augment and generator is not None:
            images = crop_and_flip(images, generator)
        return (images.float() / self.scale - self.mean) / self.std, self.labels[indices]


class MapSplit:
    """Any map-style dataset; its items are put together by torch's ``default_collate``.

    Augmentation is left to the dataset. Its randomness must come from the global generators of torch, numpy or Python, which
    the worker seeds for every batch: draws from elsewhere are not repeatable.
    """

    PURE: ClassVar[bool] = False

    def __init__(self, dataset: MapStyle) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: torch.Tensor, generator: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ARG002 - see above
        """The items of these numbers, collated."""
        inputs, targets = torch.utils.data.default_collate([self.dataset[index] for index in indices.tolist()])
        return inputs, targets


class PartSplit:
    """Some of the samples of a split.

    Args:
        split: The split.
        indices: Their numbers there, int64, shape (N,).
        augment: Hand the generator of the augmentation on; otherwise the samples come as they are.
    """

    PURE: ClassVar[bool] = False

    def __init__(self, split: Split, indices: torch.Tensor, *, augment: bool) -> None:
        self.split = split
        self.indices = indices
        self.augment = augment

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, indices: torch.Tensor, generator: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch of the split itself."""
        return self.split.batch(self.indices[indices], generator if self.augment else None)


class PurePartSplit(PartSplit):
    """Some of the samples of a split whose batches depend on their arguments alone."""

    PURE: ClassVar[bool] = True


def hold_out(data: DataSet, amount: float, generator: torch.Generator) -> DataSet:
    """Move randomly drawn training samples to a validation split.

    Args:
        data: The data set.
        amount: A fraction in (0, 1) of the training samples, or their number; 0 for none.
        generator: The only randomness.

    Raises:
        ValueError: there is a validation split already, or no training sample would be left.
    """
    if not amount:
        return data
    if data.validation is not None:
        raise ValueError(f"dataset.validation: got {amount:g}, expected 0: the data set has a validation split of its own")
    total = len(data.train)
    size = max(1, round(amount * total)) if amount < 1 else int(amount)
    if size >= total:
        raise ValueError(f"dataset.validation: got {amount:g}, expected less than the {total} training samples")
    order = torch.randperm(total, generator=generator)
    held_out, rest = (part.sort().values for part in order.split([size, total - size]))
    kind = PurePartSplit if data.train.PURE else PartSplit
    train, validation = kind(data.train, rest, augment=True), kind(data.train, held_out, augment=False)
    return dataclasses.replace(data, train=train, validation=validation)


def crop_and_flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
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
    padded = torch.nn.functional.pad(images, (PADDING,) * 4).permute(0, 2, 3, 1)
    samples = torch.arange(size)
    return padded[samples[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
