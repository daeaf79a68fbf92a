"""Heterogeneity: the workers that are slow, their mean and spread, and that all draws come from the given generator."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typing_extensions import override

from ormo_rpc.options import parts
from ormo_rpc.worker.heterogeneity import (
    ExponentialDelays,
    GammaDelays,
    HalfSlow,
    Heterogeneity,
    LognormalDelays,
    NoHeterogeneity,
    OneSlow,
    RecordedDelays,
    SlowTail,
)

DRAWS = 20_000


def draws(law: Heterogeneity, count: int = DRAWS, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor([law.slowdown(0, 4, generator) for _ in range(count)], dtype=torch.float64)


def slow(law: Heterogeneity, num_workers: int) -> list[float]:
    return [law.slowdown(worker, num_workers, torch.Generator()) for worker in range(num_workers)]


def test_no_worker_is_slowed_by_default() -> None:
    assert slow(NoHeterogeneity(), 5) == [1.0] * 5


@pytest.mark.parametrize("num_workers", [1, 2, 7])
def test_one_slow_is_the_last_worker(num_workers: int) -> None:
    assert slow(OneSlow(factor=4.0), num_workers) == [1.0] * (num_workers - 1) + [4.0]


@pytest.mark.parametrize(("num_workers", "number"), [(1, 0), (2, 1), (3, 1), (4, 2), (16, 8), (17, 8)])
def test_half_slow_is_the_upper_half_rounded_down(num_workers: int, number: int) -> None:
    assert slow(HalfSlow(), num_workers) == [1.0] * (num_workers - number) + [3.0] * number
    assert slow(HalfSlow(factor=7.0), num_workers)[-1] == (7.0 if number else 1.0)


@pytest.mark.parametrize(
    ("num_workers", "number"),
    [(1, 1), (4, 1), (16, 1), (17, 2), (32, 2), (33, 3), (64, 4)],  # workers / 16, rounded up, at least one
)
def test_the_slow_tail_is_one_in_sixteen_rounded_up(num_workers: int, number: int) -> None:
    assert slow(SlowTail(), num_workers) == [1.0] * (num_workers - number) + [10.0] * number


def test_the_slow_tail_may_be_all_workers() -> None:
    assert slow(SlowTail(fraction=1.0, factor=2.0), 3) == [2.0] * 3
    assert slow(SlowTail(fraction=0.07), 100).count(10.0) == 7, "though 0.07 * 100 is 7.000000000000001"
    assert slow(SlowTail(fraction=0.5), 5) == [1.0, 1.0, 10.0, 10.0, 10.0]  # 2.5 rounded up


@pytest.mark.parametrize(("mean", "variation"), [(1.0, 0.5), (3.0, 1.0), (0.2, 2.0)])
def test_gamma_has_its_mean_and_variation(mean: float, variation: float) -> None:
    delay = draws(GammaDelays(mean=mean, variation=variation)) - 1
    # Standard error of the mean of n draws: mean * variation / sqrt(n).
    assert abs(delay.mean().item() - mean) < 4 * mean * variation / math.sqrt(DRAWS)
    # Shape k = 1 / variation^2 has excess kurtosis 6 / k, so the sample variance has the standard error
    # variance * sqrt((6 / k + 2) / n).
    variance = (mean * variation) ** 2
    assert abs(delay.var().item() - variance) < 4 * variance * math.sqrt((6 * variation**2 + 2) / DRAWS)


def test_exponential_has_its_mean_and_median() -> None:
    delay = draws(ExponentialDelays(mean=2.5)) - 1
    # Standard deviation = mean, so the standard error of the mean is mean / sqrt(n).
    assert abs(delay.mean().item() - 2.5) < 4 * 2.5 / math.sqrt(DRAWS)
    # Half of the draws lie below the median, mean * ln 2; the share has the standard error 0.5 / sqrt(n).
    assert abs((delay < 2.5 * math.log(2)).double().mean().item() - 0.5) < 4 * 0.5 / math.sqrt(DRAWS)


def test_gamma_of_variation_one_is_exponential() -> None:
    # Two samples of n draws: the largest distance of their distributions is above 1.95 * sqrt(2 / n) by chance in 1 of 1000
    # cases (Kolmogorov and Smirnov).
    gamma = draws(GammaDelays(mean=2.0, variation=1.0), seed=1).sort().values
    exponential = draws(ExponentialDelays(mean=2.0), seed=2).sort().values
    everywhere = torch.cat([gamma, exponential])
    distance = (torch.searchsorted(gamma, everywhere) - torch.searchsorted(exponential, everywhere)).abs().max().item() / DRAWS
    assert distance < 1.95 * math.sqrt(2 / DRAWS)


@pytest.mark.parametrize("law", [GammaDelays(), ExponentialDelays()])
def test_slowdowns_are_drawn_from_the_given_generator_alone(law: Heterogeneity) -> None:
    torch.manual_seed(5)
    undisturbed = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = draws(law, 50), draws(law, 50), draws(law, 50, seed=4)
    assert torch.equal(torch.rand(3), undisturbed)
    assert torch.equal(first, again)
    assert not (first == other).any()
    generator = torch.Generator().manual_seed(3)
    of_another = torch.tensor([law.slowdown(3, 9, generator) for _ in range(50)], dtype=torch.float64)
    assert torch.equal(of_another, first)  # alike in law, whichever worker it is


LAWS: list[Heterogeneity] = [
    NoHeterogeneity(),
    OneSlow(),
    HalfSlow(),
    SlowTail(),
    GammaDelays(),
    ExponentialDelays(),
    LognormalDelays(),
]


def test_every_registered_heterogeneity_is_tested_here() -> None:
    assert {type(law) for law in LAWS} | {RecordedDelays} == set(parts("heterogeneity").values())


@dataclass(frozen=True, kw_only=True)
class FromOutside(Heterogeneity):
    """Of a user: every second ticket of worker 1 is three times slower, on average."""

    @override
    def slowdown(self, worker: int, num_workers: int, generator: torch.Generator) -> float:
        return 1.0 + 2.0 * worker * (torch.rand((), generator=generator).item() < 0.5)


@pytest.mark.parametrize("law", [*LAWS, GammaDelays(mean=2.0, variation=1.5), LognormalDelays(median=1.0, sigma=0.5)], ids=repr)
@pytest.mark.parametrize("worker", [0, 3])
def test_the_mean_slowdown_is_the_mean_of_the_draws(law: Heterogeneity, worker: int) -> None:
    source = torch.Generator().manual_seed(11)
    drawn = torch.tensor([law.slowdown(worker, 4, source) for _ in range(DRAWS)], dtype=torch.float64)
    # 4 standard errors of the mean; 0 where the slowdown lasts.
    assert abs(drawn.mean().item() - law.mean_slowdown(worker, 4)) <= 4 * drawn.std().item() / math.sqrt(DRAWS) + 1e-12


def test_the_mean_slowdown_of_a_part_from_outside_is_estimated() -> None:
    assert FromOutside().mean_slowdown(0, 4) == 1.0
    # The mean of 1000 draws of 1 or 3: standard error 1 / sqrt(1000) = 0.032.
    assert abs(FromOutside().mean_slowdown(1, 4) - 2.0) < 4 * 0.032
    assert FromOutside().mean_slowdown(1, 4) == FromOutside().mean_slowdown(1, 4)


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_no_heterogeneity_makes_a_worker_faster_than_it_is(law: Heterogeneity) -> None:
    factors = draws(law, 2000)
    assert factors.min().item() >= 1
    assert torch.isfinite(factors).all()


def test_lognormal_delays_have_the_stated_median_and_spread() -> None:
    model = LognormalDelays(median=0.5, sigma=0.8)
    source = torch.Generator().manual_seed(1)
    logs = torch.tensor([math.log(model.slowdown(0, 4, source) - 1) for _ in range(4000)], dtype=torch.float64)
    # Mean and standard deviation of log X are log 0.5 and 0.8; their standard errors 0.8 / sqrt(4000) = 0.0126 and 0.0089.
    assert abs(logs.mean().item() - math.log(0.5)) < 4 * 0.0126
    assert abs(logs.std().item() - 0.8) < 4 * 0.0089


def test_recorded_delays_are_those_of_the_trace(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"event": "header"}]
    for worker, seconds in ((0, (1.0, 2.0)), (1, (5.0, 10.0))):
        for ticket, taken in enumerate(seconds):
            place = {"worker": worker, "ticket": 10 * worker + ticket}
            lines += [{"event": "issue", "seconds": 3.0, **place}, {"event": "apply", "seconds": 3.0 + taken, **place}]
    (tmp_path / "trace.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = RecordedDelays(run=str(tmp_path))
    model.prepare()
    source = torch.Generator().manual_seed(1)
    # In units of the shortest, 1 s; a third worker is like the first.
    assert {model.slowdown(0, 3, source) for _ in range(50)} == {1.0, 2.0}
    assert {model.slowdown(1, 3, source) for _ in range(50)} == {5.0, 10.0}
    assert {model.slowdown(2, 3, source) for _ in range(50)} == {1.0, 2.0}
    assert [model.mean_slowdown(worker, 3) for worker in range(3)] == [1.5, 7.5, 1.5]


@pytest.mark.parametrize("run", [None, "/nowhere"])
def test_recorded_delays_need_a_trace(run: str | None) -> None:
    with pytest.raises(ValueError, match=r"^heterogeneity\.run: got .*, expected a run directory with a trace\.jsonl$"):
        RecordedDelays(run=run).prepare()
