"""Parts of a split, and the validation split: training samples that are held out."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ormo_rpc.data.splits import DataSet, Resident, Split


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

    def batch(self, indices: torch.Tensor, generator: torch.Generator | None) -> Any:
        """The batch of the split itself."""
        return self.split.batch(self.indices[indices], generator if self.augment else None)


class PurePartSplit(PartSplit):
    """Some of the samples of a split whose batches depend on their arguments alone."""

    PURE: ClassVar[bool] = True


class ResidentPartSplit(PurePartSplit):
    """Some of the samples of a split that can be on a device.

    Args:
        split: The split.
        indices: Their numbers there, int64, shape (N,).
        augment: As in `PartSplit`.
    """

    def __init__(self, split: Resident, indices: torch.Tensor, *, augment: bool) -> None:
        super().__init__(split, indices, augment=augment)
        self._resident = split

    @property
    def device(self) -> torch.device:
        """The device that it is on."""
        return self._resident.device

    @property
    def num_bytes(self) -> int:
        """The bytes of the whole split, all of which is put on a device."""
        return self._resident.num_bytes

    def to(self, device: torch.device) -> ResidentPartSplit:
        """Return a split on a device, with the same samples; this one stays where it is."""
        return ResidentPartSplit(self._resident.to(device), self.indices, augment=self.augment)

    def draws(self, indices: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """The numbers that make a batch of the split itself."""
        return self._resident.draws(self.indices[indices], generator if self.augment else None)

    def make(self, draws: torch.Tensor) -> Any:
        """The batch of the split itself."""
        return self._resident.make(draws)


def hold_out(data: DataSet, amount: float, generator: torch.Generator) -> DataSet:
    """Move randomly drawn training samples to a validation split.

    Args:
        data: The data set.
        amount: A fraction in (0, 1) of the training samples, or their number; 0 for none.
        generator: The only randomness.

    Raises:
        ValueError: there is a validation split already, no training sample would be left, or they are read in their own order.
    """
    if not amount:
        return data
    if data.in_order:
        raise ValueError(
            f"dataset.validation: got {amount:g}, expected 0: an iterable set is read in its own order, and nothing can be "
            "held out; return a triple (train, test, validation)"
        )
    if data.validation is not None:
        raise ValueError(f"dataset.validation: got {amount:g}, expected 0: the data set has a validation split of its own")
    total = len(data.train)
    size = max(1, round(amount * total)) if amount < 1 else int(amount)
    if size >= total:
        raise ValueError(f"dataset.validation: got {amount:g}, expected less than the {total} training samples")
    order = torch.randperm(total, generator=generator)
    held_out, rest = (part.sort().values for part in order.split([size, total - size]))
    train, validation = part_of(data.train, rest, augment=True), part_of(data.train, held_out, augment=False)
    weights = None if data.weights is None else data.weights[rest]
    return data.training_on(train, validation, weights)


def part_of(split: Split, indices: torch.Tensor, *, augment: bool) -> PartSplit:
    """Return some of the samples of a split, which can be on a device and give the same batches again where that one does.

    Args:
        split: The split.
        indices: Their numbers there, int64, shape (N,).
        augment: As in `PartSplit`.
    """
    if isinstance(split, Resident):
        return ResidentPartSplit(split, indices, augment=augment)
    return (PurePartSplit if split.PURE else PartSplit)(split, indices, augment=augment)
