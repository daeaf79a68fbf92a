"""Schedules of the user's against plain torch, whose schedulers are stepped beside an optimizer that steps as well."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from ormo_rpc.config.parsing import parse_config, parse_text
from ormo_rpc.config.schema import Config
from ormo_rpc.options.target import Target
from ormo_rpc.server.own_lr_schedule import MAX_STEPS, OwnSchedule
from tests.support import schedules

BASE, TOTAL, EPOCH = 0.3, 40, 8
TORCH = "torch.optim.lr_scheduler"
MINE = "tests.support.schedules"

SCHEDULERS: Mapping[str, dict[str, Any]] = {
    "ConstantLR": {"factor": 0.5, "total_iters": 7},
    "CosineAnnealingLR": {"T_max": 13, "eta_min": 0.01},
    "CosineAnnealingWarmRestarts": {"T_0": 5, "T_mult": 2},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.5, "step_size_up": 6, "mode": "triangular2", "cycle_momentum": False},
    "ExponentialLR": {"gamma": 0.9},
    "LinearLR": {"start_factor": 0.1, "total_iters": 9},
    "MultiStepLR": {"milestones": [3, 3, 21], "gamma": 0.2},
    "OneCycleLR": {"max_lr": 0.7, "total_steps": TOTAL, "cycle_momentum": False},
    "PolynomialLR": {"total_iters": 30, "power": 2.0},
    "StepLR": {"step_size": 6, "gamma": 0.7},
}
"""Every scheduler of torch that needs neither a metric nor another scheduler nor a function, with keywords."""
TAKEN_APART = {
    "ChainedScheduler",
    "SequentialLR",
    "LambdaLR",
    "MultiplicativeLR",
    "ReduceLROnPlateau",
    "LRScheduler",
    "_LRScheduler",
}


def of_torch(make: Callable[[torch.optim.Optimizer], LRScheduler], steps: int = TOTAL) -> list[float]:
    """The rates of the steps that a scheduler of torch gives, by taking every step."""
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=BASE, momentum=0.9)
    scheduler = make(optimizer)
    rates = list[float]()
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        parameter.grad = torch.ones(1)
        optimizer.step()
        scheduler.step()
    return rates


def own(target: str, *, total: int = TOTAL, per_epoch: bool = False, **keywords: Any) -> OwnSchedule:
    return OwnSchedule(target=Target(target, keywords), base=BASE, total=total, batches_per_epoch=EPOCH, per_epoch=per_epoch)


def rates(schedule: Callable[[int], float], total: int = TOTAL) -> list[float]:
    return [schedule(t) for t in range(total)]


def test_every_scheduler_of_torch_is_tried() -> None:
    found = {name for name, each in vars(lr_scheduler).items() if isinstance(each, type) and issubclass(each, LRScheduler)}
    assert found == {*SCHEDULERS, *TAKEN_APART}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_rates_are_those_of_torch_to_the_bit(name: str) -> None:
    keywords = SCHEDULERS[name]
    expected = of_torch(lambda optimizer: getattr(lr_scheduler, name)(optimizer, **keywords))
    schedule = own(f"{TORCH}.{name}", **keywords)
    assert rates(schedule) == expected
    assert [schedule(t) for t in reversed(range(TOTAL))] == expected[::-1], "a function of the iteration alone"
    assert schedule(TOTAL) == expected[-1]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_step_may_be_an_epoch(name: str) -> None:
    keywords = SCHEDULERS[name]
    epochs = of_torch(lambda optimizer: getattr(lr_scheduler, name)(optimizer, **keywords), 5)
    assert rates(own(f"{TORCH}.{name}", total=TOTAL - 3, per_epoch=True, **keywords), TOTAL - 3) == [
        epochs[t // EPOCH] for t in range(TOTAL - 3)
    ]


def test_the_length_of_the_run_is_known_where_torch_wants_it() -> None:
    assert rates(own(f"{TORCH}.CosineAnnealingLR")) == of_torch(lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=TOTAL))
    one_cycle = of_torch(lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.7, total_steps=TOTAL, cycle_momentum=False))
    assert rates(own(f"{TORCH}.OneCycleLR", max_lr=0.7, cycle_momentum=False)) == one_cycle
    by_epochs = rates(own(f"{TORCH}.OneCycleLR", max_lr=0.7, epochs=5, steps_per_epoch=EPOCH, cycle_momentum=False))
    assert by_epochs == one_cycle


def test_schedulers_within_schedulers_share_the_optimizer() -> None:
    def sequential(optimizer: torch.optim.Optimizer) -> LRScheduler:
        first = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=5)
        second = lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
        return lr_scheduler.SequentialLR(optimizer, [first, second], milestones=[5])

    parts = [
        {"_target_": f"{TORCH}.LinearLR", "start_factor": 0.1, "total_iters": 5},
        {"_target_": f"{TORCH}.CosineAnnealingLR", "T_max": 20},
    ]
    assert rates(own(f"{TORCH}.SequentialLR", schedulers=parts, milestones=[5])) == of_torch(sequential)

    def chained(optimizer: torch.optim.Optimizer) -> LRScheduler:
        first = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=5)
        return lr_scheduler.ChainedScheduler([first, lr_scheduler.ExponentialLR(optimizer, gamma=0.95)], optimizer)

    parts = [parts[0], {"_target_": f"{TORCH}.ExponentialLR", "gamma": 0.95}]
    assert rates(own(f"{TORCH}.ChainedScheduler", schedulers=parts)) == of_torch(chained)


@pytest.mark.parametrize("name", ["LambdaLR", "MultiplicativeLR"])
def test_a_scheduler_that_needs_a_function_gets_that_of_a_target(name: str) -> None:
    expected = of_torch(lambda o: getattr(lr_scheduler, name)(o, lr_lambda=schedules.halves(4)))
    assert rates(own(f"{TORCH}.{name}", lr_lambda={"_target_": f"{MINE}.halves", "every": 4})) == expected


def test_a_function_gives_factors_of_the_rate() -> None:
    assert rates(own(f"{MINE}.halves", every=10)) == [BASE * 0.5 ** (t // 10) for t in range(TOTAL)]
    assert rates(own(f"{MINE}.inverse_root", hold=3)) == [BASE * (1 / math.sqrt(max(1, t - 3))) for t in range(TOTAL)]
    assert rates(own(f"{MINE}.halves", every=2, per_epoch=True)) == [BASE * 0.5 ** (t // EPOCH // 2) for t in range(TOTAL)]


def test_a_function_may_return_a_scheduler() -> None:
    expected = of_torch(lambda optimizer: schedules.warmed(optimizer, 5, TOTAL))
    assert rates(own(f"{MINE}.warmed", num_warmup_steps=5, num_training_steps=TOTAL)) == expected


@pytest.mark.parametrize(
    ("target", "keywords", "message"),
    [
        (f"{TORCH}.ReduceLROnPlateau", {}, r"got .*ReduceLROnPlateau, which follows a metric; .*evaluate\.patience"),
        (f"{TORCH}.OneCycleLR", {"max_lr": 1.0}, r".*changes the momentum, .*set train\.lr_schedule\.cycle_momentum=false"),
        (f"{TORCH}.CyclicLR", {"base_lr": 0.1, "max_lr": 1.0}, r".*changes the momentum, expected the learning rate alone"),
        (f"{MINE}.CyclesWeightDecay", {}, r".*changes the weight_decay, .*stays$"),
        (
            f"{TORCH}.OneCycleLR",
            {"max_lr": 1.0, "total_steps": 39, "cycle_momentum": False},
            r"torch\.optim\.lr_scheduler\.OneCycleLR, iteration 40 of 42: ValueError: Tried to step 40 times",
        ),
        (f"{TORCH}.StepLR", {}, r"_target_: 'torch\.optim\.lr_scheduler\.StepLR' takes .*not no keywords: missing .*step_size"),
        (f"{TORCH}.StepLR", {"step": 3}, r"_target_: .*step_size"),
        (f"{TORCH}.NoSuchLR", {}, r"_target_: .* cannot be imported"),
        (f"{TORCH}.LambdaLR", {"lr_lambda": "my.function"}, r"torch\.optim\.lr_scheduler\.LambdaLR cannot be made: TypeError"),
        (f"{MINE}.number", {}, r"tests\.support\.schedules\.number returned 0\.5, expected a function from a step to a factor"),
        (f"{MINE}.negative", {}, r"tests\.support\.schedules\.negative, iteration 2 of 42: got the learning rate -0\.3, "),
        (f"{MINE}.raises", {}, r"tests\.support\.schedules\.raises, iteration 3 of 42: ZeroDivisionError"),
        (f"{MINE}.counts", {}, r".*gave the factor 0\.0625 for step 15, and then 0\.0588235; expected a function of the step"),
    ],
)
def test_what_cannot_be_right_is_refused_in_one_line(target: str, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^train\.lr_schedule[:.] ?{message}") as caught:
        _ = own(target, total=42, **keywords).rates
    assert "\n" not in str(caught.value)


def test_a_table_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^train\.lr_schedule: got 20000001 steps, .*set train\.lr_schedule_unit=epoch$"):
        _ = own(f"{MINE}.halves", total=MAX_STEPS + 1, every=3).rates


def learning_rate(**train: Any) -> Callable[[int], float]:
    return parse_config({"workers": 4, "train": {"lr": BASE, **train}}).learning_rate(EPOCH, TOTAL)


def test_warm_up_and_scaling_are_on_top() -> None:
    schedule = {"_target_": f"{TORCH}.StepLR", "step_size": 6}
    plain = of_torch(lambda optimizer: lr_scheduler.StepLR(optimizer, step_size=6))
    assert rates(learning_rate(lr_schedule=schedule)) == plain
    expected = [rate * 0.25 * min(1, (t + 1) / 12) for t, rate in enumerate(plain)]
    both = learning_rate(lr_schedule=schedule, lr_scaling="mean", warmup_epochs=1.5)
    assert rates(both) == pytest.approx(expected, rel=1e-15)
    assert rates(learning_rate(lr_schedule=schedule, lr_schedule_unit="epoch")) == [plain[t // EPOCH] for t in range(TOTAL)]


def test_the_value_of_the_option_is_saved_and_read_again() -> None:
    schedule = {"_target_": f"{TORCH}.SequentialLR", "schedulers": [{"_target_": f"{TORCH}.LinearLR"}], "milestones": [5]}
    config = parse_config({"train": {"lr_schedule": schedule}})
    assert config.train.lr_schedule == Target(
        f"{TORCH}.SequentialLR", {"schedulers": [{"_target_": f"{TORCH}.LinearLR"}], "milestones": [5]}
    )
    assert parse_text(config.yaml) == config
    function: Any = {"train": {"lr_schedule": schedules.inverse_root}}
    assert parse_config(function).train.lr_schedule == Target(f"{MINE}.inverse_root")
    assert parse_text(Config().yaml) == Config()
