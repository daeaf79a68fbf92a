"""Training, validation and test samples: a `Split` turns sample numbers into a batch, which depends on these numbers alone."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch

from ormo_rpc.data.collate import Collate, default
from ormo_rpc.data.trees import to_device
from ormo_rpc.data.weights import checked_weights

PADDING = 4
"""Pixels that a random crop reaches beyond the image on each side."""


class Split(Protocol):
    """A numbered set of samples.

    One that has an attribute ``IN_ORDER`` that is true is read in its own order: its samples are not shuffled, and
    sample p of epoch e has the number ``e N + p``.

    Attributes:
        PURE: Whether a batch depends on its arguments alone and on no other randomness, so that it may be made in any
            thread at any time.
    """

    PURE: ClassVar[bool]

    def __len__(self) -> int: ...

    def batch(self, indices: torch.Tensor, generator: torch.Generator | None) -> Any:
        """The batch of the samples numbered ``indices``, shape (B,): any tree of tensors with B rows (`ormo_rpc.data.trees`).

        Most tasks expect a pair (inputs, targets). Training passes the generator of the augmentation; with None the samples
        come as they are, for evaluation.
        """
        ...


@runtime_checkable
class MapStyle(Protocol):
    """A map-style dataset of torch: any object with a length and numbered items."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class DataSet:
    """The samples of a run.

    Args:
        train: The samples that gradients are computed on.
        test: The samples that the metrics are measured on.
        input_shape: The shape of one sample's input, without the batch, for models that are built for it.
        num_classes: Targets are 0 to ``num_classes - 1``, for tasks and models that need it; or a function that finds it out,
            which is called once, where it is needed.
        validation: The samples for choices between runs, such as of a learning rate; None where there are none.
        weights: Positive or zero, shape (N,): each epoch draws N training samples with replacement, in proportion to them;
            None: each epoch has every sample once.

    Raises:
        ValueError: the weights do not fit the training set.
    """

    def __init__(
        self,
        train: Split,
        test: Split,
        input_shape: tuple[int, ...] = (),
        num_classes: int | Callable[[], int] = 0,
        validation: Split | None = None,
        weights: Any = None,
    ) -> None:
        self.train = train
        self.test = test
        self.input_shape = input_shape
        self._num_classes = num_classes
        self.validation = validation
        self.weights = None if weights is None else checked_weights(weights, len(train))
        if weights is not None and self.in_order:
            raise ValueError("dataset.weights: got weights of an iterable set, expected none: it is read in its own order")

    @functools.cached_property
    def num_classes(self) -> int:
        """The number of classes, which may have to be counted first."""
        return self._num_classes() if callable(self._num_classes) else self._num_classes

    def classes_without(self, ignored: int) -> int:
        """Return the number of classes, where targets of one number do not count, should they have to be counted."""
        if self.known_classes is None and isinstance(self._num_classes, Counting):
            vars(self)["num_classes"] = self._num_classes.without(ignored)
        return self.num_classes

    @property
    def known_classes(self) -> int | None:
        """The number of classes, where it need not be found out; None where it must."""
        return vars(self).get("num_classes", None if callable(self._num_classes) else self._num_classes)

    def training_on(self, train: Split, validation: Split | None, weights: Any) -> DataSet:
        """Return the same problem with other training and validation samples."""
        number = self.known_classes
        return DataSet(train, self.test, self.input_shape, _ClassesOf(self) if number is None else number, validation, weights)

    @property
    def in_order(self) -> bool:
        """True where the training set is read in its own order."""
        return getattr(self.train, "IN_ORDER", False)

    def close(self) -> None:
        """Close what the splits have open; they open it again where they need it."""
        for split in (self.train, self.test, self.validation):
            if isinstance(split, Closing):
                split.close()


@runtime_checkable
class Counting(Protocol):
    """Finds out the number of classes."""

    def __call__(self) -> int:
        """Return it, with every class number that occurs."""
        ...

    def without(self, ignored: int) -> int:
        """Return it, without a number that stands for what does not count."""
        ...


class _ClassesOf:
    """Asks another data set of the same problem for the number of classes.

    Args:
        data: That data set.
    """

    def __init__(self, data: DataSet) -> None:
        self._data = data

    def __call__(self) -> int:
        return self._data.num_classes

    def without(self, ignored: int) -> int:
        return self._data.classes_without(ignored)


@runtime_checkable
class Closing(Protocol):
    """A split that keeps something open between batches."""

    def close(self) -> None:
        """Close it."""
        ...


@runtime_checkable
class Resident(Split, Protocol):
    """A split whose samples can be on a device, where its batches are made without the CPU.

    ``split.batch(indices, generator)`` is ``split.make(split.draws(indices, generator))``, the latter with the numbers on the
    device, where nothing waits for the CPU.
    """

    @property
    def device(self) -> torch.device:
        """The device that it is on."""
        ...

    @property
    def num_bytes(self) -> int:
        """The bytes that it takes on a device."""
        ...

    def to(self, device: torch.device) -> Resident:
        """Return a split on a device, with the same samples; this one stays where it is."""
        ...

    def draws(self, indices: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """All numbers that make a batch, drawn on the CPU: int64, shape (rows, B), the samples' own in the first row."""
        ...

    def make(self, draws: torch.Tensor) -> Any:
        """The batch that these numbers make, on their device."""
        ...


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
        self.scale: int | torch.Tensor = scale
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.images)

    @property
    def device(self) -> torch.device:
        """The device that it is on."""
        return self.images.device

    @property
    def num_bytes(self) -> int:
        """The bytes that it takes on a device."""
        return self.images.nbytes + self.labels.nbytes

    def to(self, device: torch.device) -> Self:
        """Return a split on a device, with the same samples; this one stays where it is."""
        there = copy.copy(self)
        there.images, there.labels = self.images.to(device), self.labels.to(device)
        there.mean, there.std = self.mean.to(device), self.std.to(device)
        # A number in its place would be a factor on a GPU, the rounded inverse.
        there.scale = torch.as_tensor(self.scale, dtype=torch.float32, device=device)
        return there

    def draws(self, indices: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """The numbers of the samples and, with a generator, those of the augmentation: see `Resident`."""
        if not self.augment or generator is None:
            return indices[None]
        return torch.cat([indices[None], crop_and_flip_draws(len(indices), generator)])

    def make(self, draws: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised float32 images, shape (B, C, H, W), and their labels."""
        images = self.images[draws[0]]
        if len(draws) > 1:
            images = crop_and_flip(images, draws[1:])
        return (images.float() / self.scale - self.mean) / self.std, self.labels[draws[0]]

    def batch(self, indices: torch.Tensor, generator: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised float32 images, shape (B, C, H, W), and their labels."""
        return self.make(to_device(self.draws(indices, generator), self.images.device))


class MapSplit:
    """Any map-style dataset, with a function that makes a batch of its items; torch's ``default_collate`` by default.

    Augmentation is left to the dataset. Its randomness must come from the global generators of torch, numpy or Python, which
    the worker seeds for every batch: draws from elsewhere are not repeatable.
    """

    PURE: ClassVar[bool] = False

    def __init__(self, dataset: MapStyle, collate: Collate = default) -> None:
        self.dataset = dataset
        self.collate = collate

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: torch.Tensor, generator: torch.Generator | None) -> Any:  # noqa: ARG002 - see above
        """The items of these numbers, collated."""
        many = getattr(self.dataset, "__getitems__", None)  # faster, where there is one: torch's DataLoader prefers it too
        numbers = indices.tolist()
        return self.collate(many(numbers) if many is not None else [self.dataset[number] for number in numbers])


def crop_and_flip_draws(size: int, generator: torch.Generator) -> torch.Tensor:
    """Draw the numbers of `crop_and_flip` for B images: offsets down, offsets to the right, flips; int64, shape (3, B)."""
    offsets = torch.randint(0, 2 * PADDING + 1, (2, size, 1), generator=generator)
    flips = torch.randint(0, 2, (1, size, 1), generator=generator)
    return torch.cat([offsets, flips]).squeeze(2)


def crop_and_flip(images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Move every image by up to `PADDING` pixels over black and mirror every second one, each independently of the others.

    Args:
        images: Shape (B, C, H, W).
        draws: What `crop_and_flip_draws` returned, on the same device.
    """
    size, _, height, width = images.shape
    down, right, flips = draws[:, :, None]
    rows = down + torch.arange(height, device=images.device)  # (B, H): the rows of the padded image that are kept
    columns = right + torch.arange(width, device=images.device)
    columns = torch.where(flips.bool(), columns.flip(1), columns)
    padded = torch.nn.functional.pad(images, (PADDING,) * 4).permute(0, 2, 3, 1)
    samples = torch.arange(size, device=images.device)
    return padded[samples[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
