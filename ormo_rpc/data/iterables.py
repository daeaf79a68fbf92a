"""Iterable sets of known length: samples are read in their own order, epoch by epoch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch

from ormo_rpc.data.collate import Collate, default
from ormo_rpc.errors import ConfigError
from ormo_rpc.seeding import reseed, seeded

READINGS = 4
"""Passes that are open at once in a process, whose workers may be at different places."""


@runtime_checkable
class IterableStyle(Protocol):
    """An iterable dataset of torch that has a length, or any other object with both."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


@dataclass
class _Reading:
    """A pass over the set that has been begun.

    Attributes:
        epoch: Its epoch.
        sets: The set, and what its ``skip`` has returned, to be told the epoch.
        iterator: What yields the samples.
        position: The number of the next one in the epoch.
        pid: The process that began it; a process forked from that one begins a pass of its own.
        last: The sample before.
        fresh: Nothing was read yet.
    """

    epoch: int
    sets: tuple[Any, ...]
    iterator: Iterator[Any]
    position: int
    pid: int
    last: Any = None
    fresh: bool = True

    def tell_epoch(self) -> None:
        """Set the epoch, which another pass may have set since."""
        for each in self.sets:
            if hasattr(each, "set_epoch"):
                each.set_epoch(self.epoch)


class IterableSplit:
    """An iterable set, whose sample p of epoch e has the number ``e N + p``: each pass is read in the set's own order.

    A batch is the same whatever was read before. A set that has ``set_epoch`` is told the epoch before each pass, and again
    where passes of two epochs are open; what it draws from the global generators is seeded by the seed, the epoch and the
    position. Samples that other processes train on are read and dropped; a set that has ``skip(n)``, which returns it without
    its first n samples, begins behind them, and an iterator that has ``skip(n)`` passes over them. Either begins one sample
    earlier, which is read and dropped with what is drawn at the beginning of the pass. A pass is begun again for a sample that
    lies behind.

    Args:
        dataset: The set; each pass begins with a new iterator, in each process.
        collate: Makes a batch of a list of samples.

    Attributes:
        seed: The seed of random draws.
    """

    PURE: ClassVar[bool] = False
    IN_ORDER: ClassVar[bool] = True

    def __init__(self, dataset: IterableStyle, collate: Collate = default) -> None:
        self.dataset = dataset
        self.collate = collate
        self.seed = 0
        self._size = len(dataset)
        self._readings: list[_Reading] = []
        """In the order of their last use."""
        self._told: int | None = None
        """The epoch that the set was told in this batch."""

    def __len__(self) -> int:
        return self._size

    def batch(self, indices: torch.Tensor, generator: torch.Generator | None) -> Any:  # noqa: ARG002 - draws are seeded by place
        """The samples of these numbers, collated.

        Raises:
            ConfigError: the set has not as many samples as its length says, or cannot be read more than once.
        """
        self._told = None
        with seeded(self.seed, "pass", 0):
            items = [self._sample(*divmod(number, self._size)) for number in indices.tolist()]
        return self.collate(items)

    def close(self) -> None:
        """Close all passes."""
        while self._readings:
            self._end(self._readings.pop())

    def _sample(self, epoch: int, position: int) -> Any:
        reading = self._reading(epoch, position)
        if position < reading.position:
            return reading.last
        skip = getattr(reading.iterator, "skip", None)
        goal = position - reading.fresh
        if skip is not None and goal > reading.position:
            skip(goal - reading.position)
            reading.position = goal
        while reading.position <= position:
            self._read(reading)
        if reading.position == self._size:
            self._check_end(reading)
        return reading.last

    def _reading(self, epoch: int, position: int) -> _Reading:
        """Return the pass that is nearest to a sample, but not beyond it; begin one where there is none."""
        self._readings = [each for each in self._readings if each.pid == os.getpid()]
        behind = [each for each in self._readings if each.epoch == epoch and each.position - (not each.fresh) <= position]
        if behind:
            found = max(behind, key=lambda each: each.position)
            self._readings.remove(found)
        else:
            if len(self._readings) == READINGS:
                self._end(self._readings.pop(0))
            found = self._begin(epoch, position)
        if self._told != epoch:
            found.tell_epoch()
            self._told = epoch
        self._readings.append(found)
        return found

    def _begin(self, epoch: int, position: int) -> _Reading:
        reseed(self.seed, "pass", epoch * self._size)
        whole: Any = self.dataset
        # What is read first draws as the beginning of the pass does: so the sample before the wanted one is read and dropped.
        start = position - 1 if position > 0 and hasattr(whole, "skip") else 0
        sets = (whole, whole.skip(start)) if start else (whole,)
        reading = _Reading(epoch, sets, iter(()), start, os.getpid())
        reading.tell_epoch()
        reading.iterator = iter(sets[-1])
        if reading.iterator is whole:
            raise ConfigError(
                f"dataset: {_name(whole)} is an iterator, which is read once; expected a set whose __iter__ returns a new one"
            )
        return reading

    def _read(self, reading: _Reading) -> None:
        # What comes before the first yield belongs to the beginning of the pass.
        place = 0 if reading.fresh else reading.position
        reseed(self.seed, "pass", reading.epoch * self._size + place)
        try:
            reading.last = next(reading.iterator)
        except StopIteration:
            raise ConfigError(self._miscounted(reading, f"ended after {reading.position} samples")) from None
        except BaseException:
            self._readings.remove(reading)  # a generator that has raised is at its end
            raise
        reading.position += 1
        reading.fresh = False

    def _check_end(self, reading: _Reading) -> None:
        """Refuse a set that goes on behind its last sample, and let it close what it has open."""
        nothing = object()
        if next(reading.iterator, nothing) is not nothing:
            raise ConfigError(self._miscounted(reading, "goes on after them"))

    def _miscounted(self, reading: _Reading, what: str) -> str:
        self.close()
        return (
            f"dataset: {_name(self.dataset)} has the length {self._size}, but {what} in epoch {reading.epoch}; its __len__ "
            "must be the number of samples that each pass yields"
        )

    @staticmethod
    def _end(reading: _Reading) -> None:
        close = getattr(reading.iterator, "close", None)
        if close is not None:
            with contextlib.suppress(Exception):  # of no use to anybody: a user's own may raise anything
                close()


def _name(dataset: object) -> str:
    return type(dataset).__name__
