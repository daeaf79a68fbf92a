"""Learning-rate schedules as a user would write them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from typing_extensions import override


def inverse_root(total: int, base: float, hold: int = 0) -> Callable[[int], float]:
    """Hold, then fall with the root; ``total`` and ``base`` come from the run."""
    assert total > 0
    assert base > 0
    return lambda step: 1 / math.sqrt(max(1, step - hold))


def halves(every: int) -> Callable[[int], float]:
    return lambda step: 0.5 ** (step // every)


def warmed(optimizer: torch.optim.Optimizer, num_warmup_steps: int, num_training_steps: int) -> LRScheduler:
    """A function that returns a scheduler, in the form that libraries of models have them."""
    return LambdaLR(optimizer, lambda step: min(1, (step + 1) / num_warmup_steps) * (1 - step / num_training_steps))


def counts() -> Callable[[int], float]:
    """A schedule that depends on how often it was asked."""
    calls = itertools.count(1)
    return lambda _: 1 / next(calls)


def negative() -> Callable[[int], float]:
    return lambda step: 1 - step


def number() -> float:
    return 0.5


def raises() -> Callable[[int], float]:
    return lambda step: 1 / (3 - step)


class CyclesWeightDecay(LRScheduler):
    """Changes more than the rate."""

    @override
    def get_lr(self) -> list[float | torch.Tensor]:
        self.optimizer.param_groups[0]["weight_decay"] = 0.1 * self.last_epoch
        return [group["lr"] for group in self.optimizer.param_groups]
