"""Machines that differ in speed: the factor by which a worker takes longer than its computation alone.

A live worker sleeps for the difference; a simulated one adds it to its virtual time. A factor is never below 1, because a live
worker cannot be made faster than it is. A live computation is measured in processor time (`cpu_seconds`), so that where
processes share cores a slow worker does not sleep for what it waited for one: its wait is no work that a slower machine would
take longer for.
"""

from __future__ import annotations

import functools
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from typing_extensions import override

from ormo_rpc.options import Part, at_least_one, option, positive, register
from ormo_rpc.seeding import generator as generator_of

ESTIMATE_DRAWS = 1000
"""Draws from which the mean slowdown of a part from outside of the package is estimated, unless it states its own."""


def cpu_seconds() -> float:
    """The processor time that this thread has taken so far; the difference of two is what it computed in between.

    The calling thread takes part in all that torch computes with several threads, backward passes included, so that its time is
    that of the pass on cores of its own, where the process's would be several times as much. Threads that wait for one another
    spin, which counts: with ``runtime.threads`` above 1, and more threads than cores, it is more.
    """
    return time.thread_time()


def shares_of(total: int, slowdowns: Sequence[float]) -> list[int]:
    """Divide samples in proportion to speeds, the inverses of the slowdowns: whole numbers, by the largest remainders."""
    speeds = [1 / slowdown for slowdown in slowdowns]
    exact = [total * speed / sum(speeds) for speed in speeds]
    sizes = [int(share) for share in exact]
    rest = sorted(range(len(exact)), key=lambda worker: sizes[worker] - exact[worker])
    for worker in rest[: total - sum(sizes)]:
        sizes[worker] += 1
    return sizes


@dataclass(frozen=True, kw_only=True)
class Heterogeneity(Part, ABC):
    """The distribution of a worker's slowdown for a ticket, and its options."""

    PATH = "heterogeneity"

    def prepare(self) -> None:
        """Check that `slowdown` can work, before anything starts.

        Raises:
            ValueError: it cannot; the message has the key to change.
        """

    @abstractmethod
    def slowdown(self, worker: int, num_workers: int, generator: torch.Generator) -> float:
        """The factor >= 1 by which the worker's next ticket takes longer; random draws come from ``generator`` alone."""

    def mean_slowdown(self, worker: int, num_workers: int) -> float:
        """The expected factor of the worker's tickets: in the long run its speed is that of its machine divided by this.

        Exact in each part of the package; a part from outside has an estimate, the mean of `ESTIMATE_DRAWS` draws of
        `slowdown`, unless it overrides this.
        """
        source = generator_of(0, "mean slowdown", worker)
        return sum(self.slowdown(worker, num_workers, source) for _ in range(ESTIMATE_DRAWS)) / ESTIMATE_DRAWS


@dataclass(frozen=True, kw_only=True)
class LastingSlowdown(Heterogeneity):
    """A slowdown that is the same for all tickets of a worker."""

    @abstractmethod
    @override
    def mean_slowdown(self, worker: int, num_workers: int) -> float: ...

    @override
    def slowdown(self, worker: int, num_workers: int, generator: torch.Generator) -> float:
        return self.mean_slowdown(worker, num_workers)


@register("none")
@dataclass(frozen=True, kw_only=True)
class NoHeterogeneity(LastingSlowdown):
    """No slowdown: each worker is as fast as its machine."""

    @override
    def mean_slowdown(self, worker: int, num_workers: int) -> float:
        return 1.0


@register("one_slow")
@dataclass(frozen=True, kw_only=True)
class OneSlow(LastingSlowdown):
    """The last worker is slower than the others, ten times by default."""

    factor: float = option(10.0, "slowdown, 1 for none", valid=at_least_one, expected="a finite number >= 1")

    @override
    def mean_slowdown(self, worker: int, num_workers: int) -> float:
        return self.factor if worker == num_workers - 1 else 1.0


@register("half_slow")
@dataclass(frozen=True, kw_only=True)
class HalfSlow(LastingSlowdown):
    """The upper half of the workers, ``floor(K / 2)`` of them, is slower than the others, three times by default."""

    factor: float = option(3.0, "slowdown, 1 for none", valid=at_least_one, expected="a finite number >= 1")

    @override
    def mean_slowdown(self, worker: int, num_workers: int) -> float:
        return self.factor if worker >= num_workers - num_workers // 2 else 1.0


@register("slow_tail")
@dataclass(frozen=True, kw_only=True)
class SlowTail(LastingSlowdown):
    """A fraction of the workers, at least one, is slower than the others.

    1/16 of them as in the experiments of arXiv 2407.19234.
    """

    factor: float = option(10.0, "slowdown, 1 for none", valid=at_least_one, expected="a finite number >= 1")
    fraction: float = option(
        1 / 16,
        "fraction of the workers that are slower, at least one of them",
        valid=lambda v: 0 < v <= 1,
        expected="a number in (0, 1]",
    )

    @override
    def mean_slowdown(self, worker: int, num_workers: int) -> float:
        slow = max(1, math.ceil(round(self.fraction * num_workers, 9)))  # 0.07 of 100 are 7, not 7.000000000000001
        return self.factor if worker >= num_workers - slow else 1.0


@register("gamma")
@dataclass(frozen=True, kw_only=True)
class GammaDelays(Heterogeneity):
    """Every ticket takes ``1 + X`` times as long, X gamma distributed.

    Source: the family of Hakimi et al. 2019, arXiv 1907.11612.
    """

    mean: float = option(1.0, "mean of X", valid=positive, expected="a finite number > 0")
    variation: float = option(
        0.5, "coefficient of variation of X: standard deviation / mean", valid=positive, expected="a finite number > 0"
    )

    @override
    def slowdown(self, worker: int, num_workers: int, generator: torch.Generator) -> float:
        shape = 1 / self.variation**2
        # torch.distributions takes no generator; its sampler underneath does.
        draw = torch._standard_gamma(torch.tensor(shape, dtype=torch.float64), generator=generator)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage] # see above
        return 1 + self.mean / shape * draw.item()

    @override
    def mean_slowdown(self, worker: int, num_workers: int) -> float:
        return 1 + self.mean


@register("exponential")
@dataclass(frozen=True, kw_only=True)
class ExponentialDelays(Heterogeneity):
    """Every ticket takes ``1 + X`` times as long, X exponentially distributed."""

    mean: float = option(1.0, "mean of X", valid=positive, expected="a finite number > 0")

    @override
    def slowdown(self, worker: int, num_workers: int, generator: torch.Generator) -> float:
        draw = torch.empty((), dtype=torch.float64).exponential_(1 / self.mean, generator=generator)
        return 1 + draw.item()

    @override
    def mean_slowdown(self, worker: int, num_workers: int) -> float:
        return 1 + self.mean


@register("lognormal")
@dataclass(frozen=True, kw_only=True)
class LognormalDelays(Heterogeneity):
    """Every ticket takes ``1 + X`` times as long, X lognormally distributed: most a little, a few very much."""

    median: float = option(0.5, "median of X", valid=positive, expected="a finite number > 0")
    sigma: float = option(1.0, "standard deviation of log X", valid=positive, expected="a finite number > 0")

    @override
    def slowdown(self, worker: int, num_workers: int, generator: torch.Generator) -> float:
        normal = torch.empty((), dtype=torch.float64).normal_(generator=generator).item()
        return 1 + self.median * math.exp(self.sigma * normal)

    @override
    def mean_slowdown(self, worker: int, num_workers: int) -> float:
        return 1 + self.median * math.exp(self.sigma**2 / 2)


@register("recorded")
@dataclass(frozen=True, kw_only=True)
class RecordedDelays(Heterogeneity):
    """Tickets take as long as those of a recorded run did, in units of its shortest one.

    A ticket's time is that from its issue to its update in the trace, the network included. Worker k draws from the times of
    worker k modulo the number of recorded ones, with replacement.
    """

    run: str | None = option(None, "the run directory of the recorded run", path=True)

    @override
    def prepare(self) -> None:
        if self.run is None or not (Path(self.run) / "trace.jsonl").is_file():
            raise ValueError(f"{self.key('run')}: got {self.run!r}, expected a run directory with a trace.jsonl")
        if not _recorded_slowdowns(self.run):
            raise ValueError(f"{self.key('run')}: got {self.run!r}, in whose trace no gradient was applied")

    @override
    def slowdown(self, worker: int, num_workers: int, generator: torch.Generator) -> float:
        slowdowns = self._slowdowns(worker)
        return slowdowns[int(torch.randint(len(slowdowns), (), generator=generator))]

    @override
    def mean_slowdown(self, worker: int, num_workers: int) -> float:
        slowdowns = self._slowdowns(worker)
        return sum(slowdowns) / len(slowdowns)

    def _slowdowns(self, worker: int) -> list[float]:
        assert self.run is not None, "prepare has been called"
        recorded = _recorded_slowdowns(self.run)
        return recorded[worker % len(recorded)]


@functools.lru_cache(maxsize=1)
def _recorded_slowdowns(run: str) -> list[list[float]]:
    """The times of each worker's applied tickets, in units of the shortest time in the run."""
    began: dict[tuple[int, int], float] = {}
    seconds: dict[int, list[float]] = {}
    with (Path(run) / "trace.jsonl").open(encoding="utf-8") as trace:
        for event in map(json.loads, trace):
            if event["event"] in ("issue", "reissue"):
                began[event["worker"], event["ticket"]] = event["seconds"]
            elif event["event"] == "apply" and (event["worker"], event["ticket"]) in began:  # else of the run it resumed
                taken = event["seconds"] - began[event["worker"], event["ticket"]]
                seconds.setdefault(event["worker"], []).append(max(taken, 1e-6))  # the clock of the trace has microseconds
    shortest = min((min(each) for each in seconds.values()), default=1.0)
    return [[taken / shortest for taken in seconds[worker]] for worker in sorted(seconds)]
