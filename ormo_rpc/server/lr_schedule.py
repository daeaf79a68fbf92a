"""The scheduled learning rate: a pure function of the iteration, so that a resumed or replayed run gets the same."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from ormo_rpc.server.own_lr_schedule import OwnSchedule


class Shape(Enum):
    """The shape of a learning-rate schedule."""

    constant = "constant"
    step = "step"
    """Times ``gamma`` at every milestone."""
    cosine = "cosine"
    """Half a cosine from the start to zero at the end (Loshchilov and Hutter 2017, arXiv 1608.03983, without restarts)."""


class Unit(Enum):
    """A step of a schedule that has a ``_target_``."""

    iteration = "iteration"
    epoch = "epoch"


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """``eta(t)``, after a linear warm-up.

    Attributes:
        base: The learning rate at its highest; of a schedule of the user's it does not count.
        shape: The shape of its decay, or a schedule of the user's.
        milestones: Iterations at which it is multiplied by gamma, for ``step``.
        gamma: That factor.
        warmup: Iterations over which it rises linearly from ``base / warmup``.
        total: Iterations of the whole run, for ``cosine``.
        scale: A factor of the rates of a schedule of the user's.
    """

    base: float
    shape: Shape | OwnSchedule = Shape.constant
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    warmup: int = 0
    total: int = 0
    scale: float = 1.0

    def prepare(self) -> None:
        """Compute what takes time.

        Raises:
            ValueError: the schedule is not usable; one line with the key.
        """
        if isinstance(self.shape, OwnSchedule):
            _ = self.shape.rates

    def __call__(self, iteration: int) -> float:
        """Return ``eta`` at an iteration ``t``."""
        lr = self.shape(iteration) * self.scale if isinstance(self.shape, OwnSchedule) else self.base
        if self.shape is Shape.step:
            lr *= self.gamma ** sum(iteration >= milestone for milestone in self.milestones)
        elif self.shape is Shape.cosine:
            lr *= (1 + math.cos(math.pi * min(iteration, self.total) / self.total)) / 2
        if iteration < self.warmup:
            lr *= (iteration + 1) / self.warmup
        return lr
