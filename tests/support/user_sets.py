"""Data sets as users have them: shaped like those of Hugging Face, and iterable ones with and without what they may have."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset


class Rows:
    """The shape of a ``datasets.Dataset``: plain values until it is given a format."""

    def __init__(
        self, columns: Mapping[str, Sequence[Any]], form: str | None = None, shown: Sequence[str] | None = None
    ) -> None:
        self._columns = columns
        self._shown = list(columns) if shown is None else list(shown)
        self.format: Mapping[str, Any] = {"type": form, "columns": self._shown}

    @property
    def column_names(self) -> list[str]:
        """All columns, also those that are not shown."""
        return list(self._columns)

    def with_format(self, type: str | None = None, columns: Sequence[str] | None = None) -> Rows:  # noqa: A002 - its name there
        """Return the same rows in another form."""
        return Rows(self._columns, type, columns)

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = {name: self._columns[name][index] for name in self._shown}
        if self.format["type"] != "torch":
            return row
        return {name: value if isinstance(value, str) else torch.as_tensor(value) for name, value in row.items()}


class Counting(IterableDataset[tuple[torch.Tensor, int]]):
    """An iterable set that draws from all global generators, and notes what it is asked for.

    Args:
        length: Its length.
        yields: The samples of a pass, if these are others.
    """

    def __init__(self, length: int, yields: int | None = None) -> None:
        self.length = length
        self.yields = length if yields is None else yields
        self.epoch = 0
        self.passes = 0
        self.read = 0
        self.closed = 0

    def set_epoch(self, epoch: int) -> None:
        """Take the epoch of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        self.passes += 1
        epoch = self.epoch
        try:
            order = torch.randperm(self.yields).tolist()  # of each epoch another one
            for number in order:
                self.read += 1
                drawn = random.random() + float(np.random.rand()) + float(torch.rand(()))
                yield torch.tensor([float(number), drawn]), 100 * epoch + number
        finally:
            self.closed += 1


class Skipping(IterableDataset[int]):
    """An iterable set that can begin anywhere, and whose iterator can go on anywhere; it draws nothing."""

    def __init__(self, length: int, start: int = 0) -> None:
        self.length = length
        self.start = start
        self.read = 0
        self.begun: list[int] = []

    def skip(self, count: int) -> Skipping:
        """Return the set without its first samples."""
        rest = Skipping(self.length, self.start + count)
        rest.begun = self.begun
        return rest

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> SkippingIterator:
        self.begun.append(self.start)
        return SkippingIterator(self.start, self.length)


class DrawingAnOrder(IterableDataset[tuple[int, float]]):
    """A set that can begin anywhere; it draws its order as a pass begins, and with each sample.

    Args:
        length: Its length.
        start: The samples that it begins behind.
    """

    def __init__(self, length: int, start: int = 0) -> None:
        self.length = length
        self.start = start

    def skip(self, count: int) -> DrawingAnOrder:
        """Return the set without its first samples."""
        return DrawingAnOrder(self.length, self.start + count)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, float]]:
        for number in torch.randperm(self.length).tolist()[self.start :]:
            yield number, random.random()


class DrawingSkipping(IterableDataset[tuple[int, float]]):
    """A set whose iterator can go on anywhere, and draws its order as it is made, or with the first sample.

    Args:
        length: Its length.
        late: With the first sample.
    """

    def __init__(self, length: int, *, late: bool) -> None:
        self.length = length
        self.late = late

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> DrawingIterator:
        return DrawingIterator(self.length, late=self.late)


class DrawingIterator:
    """Of `DrawingSkipping`."""

    def __init__(self, length: int, *, late: bool) -> None:
        self.length = length
        self.order = [] if late else torch.randperm(length).tolist()
        self.next = 0

    def skip(self, count: int) -> None:
        """Pass over samples."""
        self.next += count

    def __iter__(self) -> DrawingIterator:
        return self

    def __next__(self) -> tuple[int, float]:
        self.order = self.order or torch.randperm(self.length).tolist()
        if self.next >= self.length:
            raise StopIteration
        self.next += 1
        return self.order[self.next - 1], random.random()


class SkippingIterator:
    """Of `Skipping`."""

    def __init__(self, start: int, stop: int) -> None:
        self.next = start
        self.stop = stop

    def skip(self, count: int) -> None:
        """Pass over samples."""
        self.next += count

    def __iter__(self) -> SkippingIterator:
        return self

    def __next__(self) -> int:
        if self.next >= self.stop:
            raise StopIteration
        self.next += 1
        return self.next - 1
