"""The scheduled learning rate against torch's schedulers, which are stepped, and by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR

from ormo_rpc.config.parsing import parse_config
from ormo_rpc.server.lr_schedule import LearningRate, Shape

BASE, TOTAL = 0.3, 40


def of_torch(make: Callable[[torch.optim.Optimizer], LRScheduler]) -> list[float]:
    """The rates of the iterations 0 to TOTAL - 1 that a scheduler of torch gives, by taking every step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=BASE)
    scheduler = make(optimizer)
    rates: list[float] = []
    for _ in range(TOTAL):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def ours(lr: LearningRate) -> list[float]:
    return [lr(t) for t in range(TOTAL)]


def test_constant() -> None:
    assert ours(LearningRate(base=BASE)) == [BASE] * TOTAL


def test_cosine_is_torchs() -> None:
    expected = of_torch(lambda optimizer: CosineAnnealingLR(optimizer, T_max=TOTAL))
    lr = LearningRate(base=BASE, shape=Shape.cosine, total=TOTAL)
    assert ours(lr) == pytest.approx(expected, rel=1e-12)
    # By hand: half way cos(pi / 2) = 0, so a half of the base; at the end and after it cos(pi) = -1, so nothing.
    assert lr(TOTAL // 2) == pytest.approx(BASE / 2)
    assert (lr(TOTAL), lr(TOTAL + 7)) == (0, 0)


def test_step_is_torchs() -> None:
    expected = of_torch(lambda optimizer: MultiStepLR(optimizer, milestones=[7, 7, 25], gamma=0.2))
    lr = LearningRate(base=BASE, shape=Shape.step, milestones=(7, 7, 25), gamma=0.2)
    assert ours(lr) == pytest.approx(expected, rel=1e-12)
    # By hand: 0.3, then 0.3 * 0.2^2 = 0.012 from iteration 7 on, then 0.3 * 0.2^3 = 0.0024 from iteration 25 on.
    assert [lr(t) for t in (6, 7, 24, 25)] == pytest.approx([0.3, 0.012, 0.012, 0.0024])


def test_a_milestone_between_two_iterations_acts_at_the_next() -> None:
    lr = LearningRate(base=BASE, shape=Shape.step, milestones=(7.5,))
    assert [lr(7), lr(8)] == pytest.approx([0.3, 0.03])


def test_warm_up_is_torchs() -> None:
    # Ours rises from base / 8 at iteration 0 to base at iteration 7: torch's start factor 1/8, reached in 8 - 1 steps.
    expected = of_torch(lambda optimizer: LinearLR(optimizer, start_factor=1 / 8, total_iters=7))
    assert ours(LearningRate(base=BASE, warmup=8)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", [Shape.step, Shape.cosine])
def test_warm_up_multiplies_the_decayed_rate(shape: Shape) -> None:
    both = LearningRate(base=BASE, shape=shape, milestones=(3, 20), gamma=0.5, warmup=10, total=TOTAL)
    falling = LearningRate(base=BASE, shape=shape, milestones=(3, 20), gamma=0.5, total=TOTAL)
    rising = of_torch(lambda optimizer: LinearLR(optimizer, start_factor=1 / 10, total_iters=9))
    assert ours(both) == pytest.approx([f * r / BASE for f, r in zip(ours(falling), rising, strict=True)], rel=1e-12)


def test_it_is_a_function_of_the_iteration_alone() -> None:
    lr = LearningRate(base=BASE, shape=Shape.cosine, warmup=5, total=TOTAL)
    forwards = ours(lr)
    assert [lr(t) for t in reversed(range(TOTAL))] == forwards[::-1]


def test_a_milestone_that_rounding_puts_behind_an_iteration_is_that_iteration() -> None:
    config = parse_config({"train": {"lr": BASE, "lr_schedule": "step", "lr_milestones": [2.2], "lr_gamma": 0.5}})
    lr = config.learning_rate(45, 200)  # 2.2 * 45 is 99.00000000000001
    assert [lr(98), lr(99)] == [BASE, 0.5 * BASE]
