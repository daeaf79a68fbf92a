"""Machines that differ in speed: how much longer than its own computation a worker takes for a ticket.

A live worker sleeps for the difference; a simulated one adds it to its virtual time. A factor is never below 1, because a live
worker cannot be made faster than it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ormo_rpc.options import Section, option


def _at_least_one(value: float) -> bool:
    return math.isfinite(value) and value >= 1


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


@dataclass(frozen=True, kw_only=True)
class Heterogeneity(Section):
    """All workers are as fast as they are (``none``)."""

    PATH = "heterogeneity"
    name: str = option("none", "how the workers' speeds differ: none, as fast as they are")

    def slowdown(self, worker: int, num_workers: int, generator: torch.Generator) -> float:  # noqa: ARG002 - nobody is slowed
        """The factor >= 1 by which the worker's next ticket takes longer; random draws come from ``generator`` alone."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class OneSlow(Heterogeneity):
    """The last worker is slower than the others."""

    name: str = option("one_slow", "the last worker is slower than the others")
    factor: float = option(10.0, "how many times slower", valid=_at_least_one, expected="a finite number >= 1")

    def slowdown(self, worker: int, num_workers: int, generator: torch.Generator) -> float:  # noqa: ARG002 - nothing is random
        """``factor`` for the last worker, 1 for the others."""
        return self.factor if worker == num_workers - 1 else 1.0


@dataclass(frozen=True, kw_only=True)
class SlowTail(Heterogeneity):
    """A fraction of the workers, at least one, is slower than the others; 1/16 as in the experiments of arXiv 2407.19234."""

    name: str = option("slow_tail", "a fraction of the workers, the last ones, is slower than the others")
    factor: float = option(10.0, "how many times slower", valid=_at_least_one, expected="a finite number >= 1")
    fraction: float = option(
        1 / 16, "which part of the workers, at least one of them", valid=lambda v: 0 < v <= 1, expected="a number in (0, 1]"
    )

    def slowdown(self, worker: int, num_workers: int, generator: torch.Generator) -> float:  # noqa: ARG002 - nothing is random
        """``factor`` for the last ``ceil(fraction * num_workers)`` workers, 1 for the others."""
        slow = max(1, math.ceil(self.fraction * num_workers))
        return self.factor if worker >= num_workers - slow else 1.0


@dataclass(frozen=True, kw_only=True)
class GammaDelays(Heterogeneity):
    """Every ticket takes ``1 + X`` times as long, X gamma distributed (the family of Hakimi et al. 2019, arXiv 1907.11612)."""

    name: str = option("gamma", "every ticket takes 1 + X times as long, X gamma distributed")
    mean: float = option(1.0, "mean of X", valid=_positive, expected="a finite number > 0")
    variation: float = option(
        0.5, "coefficient of variation of X: standard deviation / mean", valid=_positive, expected="a finite number > 0"
    )

    def slowdown(self, worker: int, num_workers: int, generator: torch.Generator) -> float:  # noqa: ARG002 - alike in law
        """``1 + X`` with X of shape ``1 / variation^2`` and the given mean."""
        shape = 1 / self.variation**2
        # torch.distributions takes no generator; its sampler underneath does.
        draw = torch._standard_gamma(torch.tensor(shape, dtype=torch.float64), generator=generator)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage] # see above
        return 1 + self.mean / shape * draw.item()


@dataclass(frozen=True, kw_only=True)
class ExponentialDelays(Heterogeneity):
    """Every ticket takes ``1 + X`` times as long, X exponentially distributed."""

    name: str = option("exponential", "every ticket takes 1 + X times as long, X exponentially distributed")
    mean: float = option(1.0, "mean of X", valid=_positive, expected="a finite number > 0")

    def slowdown(self, worker: int, num_workers: int, generator: torch.Generator) -> float:  # noqa: ARG002 - alike in law
        """``1 + X`` with the given mean of X."""
        draw = torch.empty((), dtype=torch.float64).exponential_(1 / self.mean, generator=generator)
        return 1 + draw.item()


HETEROGENEITIES: dict[str, type[Heterogeneity]] = {
    "none": Heterogeneity,
    "one_slow": OneSlow,
    "slow_tail": SlowTail,
    "gamma": GammaDelays,
    "exponential": ExponentialDelays,
}
"""The models by name."""
