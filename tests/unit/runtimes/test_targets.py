"""Targets against a slow reference, in the direction of their metric, and over resumed runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ormo_rpc.config.parsing import parse_config
from ormo_rpc.config.schema import Config
from ormo_rpc.errors import ConfigError
from ormo_rpc.runtimes.ranking import check_choice
from ormo_rpc.runtimes.targets import Targets, check_clock
from ormo_rpc.tasks.metrics import TaskMetric
from ormo_rpc.worker.evaluation import Evaluation


def targets(metric: str = "accuracy", **evaluate: Any) -> Targets:
    return targets_of(parse_config({"evaluate": evaluate}), metric)


def targets_of(config: Config, metric: str = "accuracy") -> Targets:
    higher = metric == "accuracy"
    return Targets(config, lambda name: TaskMetric(name, "", name != "loss" and higher))


def evaluation(value: float, metric: str = "accuracy", validation: float | None = None) -> Evaluation:
    other = None if validation is None else {"loss": 0.0, metric: validation}
    return Evaluation({"loss": 0.0, metric: value}, other)


def first_reached(values: Sequence[float], target: float, smooth: int, *, higher: bool) -> int | None:
    """The number of the first evaluation at which the mean of the last ``smooth`` ones is as good as the target."""
    for number in range(smooth, len(values) + 1):
        window = values[number - smooth : number]
        if not any(math.isnan(each) or math.isinf(each) for each in window):
            total = sum(window)  # of quarters, exact
            if (total >= target * smooth) if higher else (total <= target * smooth):
                return number
    return None


@given(
    values=st.lists(st.one_of(st.integers(0, 8).map(lambda n: n / 4), st.sampled_from([math.nan, math.inf])), max_size=15),
    target=st.integers(0, 8).map(lambda n: n / 4),
    smooth=st.sampled_from([1, 2, 4]),
    higher=st.booleans(),
    cut=st.integers(0, 15),
)
def test_a_target_is_reached_by_the_mean_of_the_last_evaluations_and_a_resumed_run_goes_on(
    values: list[float], target: float, smooth: int, *, higher: bool, cut: int
) -> None:
    metric = "accuracy" if higher else "error"
    options = {"targets": [target], "smooth": smooth}
    whole, first, second = (targets(metric, **options) for _ in range(3))
    for number, value in enumerate(values, 1):
        whole.add(10 * number, 0.5 * number, evaluation(value, metric))
    for number, value in enumerate(values[:cut], 1):
        first.add(10 * number, 0.5 * number, evaluation(value, metric))
    # The second run has a clock of its own, which begins at the checkpoint, of iteration 10 cut + 3 at 0.5 cut + 0.125 seconds.
    second.load_state_dict(first.state_dict(), 10 * cut + 3, seconds=0.5 * cut + 0.125)
    for number, value in enumerate(values[cut:], cut + 1):
        second.add(10 * number, 0.5 * number - 0.5 * cut - 0.125, evaluation(value, metric))
    found = first_reached(values, target, smooth, higher=higher)
    entries = whole.summary_entries()
    assert entries["seconds_to"] == {repr(target): None if found is None else 0.5 * found}
    assert entries["gradients_to"] == {repr(target): None if found is None else 10 * found}
    assert second.summary_entries() == entries


def test_the_main_metric_counts_on_both_splits_and_is_named() -> None:
    mine = targets(targets=[0.5, 0.75])
    mine.add(10, 1.0, evaluation(0.6, validation=0.4))
    mine.add(20, 2.0, evaluation(0.8, validation=0.5))
    assert mine.summary_entries() == {
        "target_metric": "accuracy",
        "seconds_to": {"0.5": 1.0, "0.75": 2.0},
        "gradients_to": {"0.5": 10, "0.75": 20},
        "val_seconds_to": {"0.5": 2.0, "0.75": None},
        "val_gradients_to": {"0.5": 20, "0.75": None},
    }


def test_without_validation_split_targets_or_evaluations_there_is_nothing_to_tell() -> None:
    mine = targets(targets=[0.5])
    unreached: dict[str, Any] = {"seconds_to": {"0.5": None}, "gradients_to": {"0.5": None}}
    none: dict[str, Any] = {"target_metric": None, "val_seconds_to": None, "val_gradients_to": None}
    assert mine.summary_entries() == {**none, **unreached}, "every evaluation failed"
    mine.add(10, 1.0, evaluation(0.4))
    assert mine.summary_entries() == {**none, **unreached, "target_metric": "accuracy"}
    without = targets()
    without.add(10, 1.0, evaluation(0.4))
    assert set(without.summary_entries().values()) == {None}


def test_what_a_crash_has_undone_is_replaced() -> None:
    mine = targets(targets=[0.5], smooth=2)
    for iteration, value in ((10, 0.5), (20, 0.6), (30, 0.9), (20, 0.4), (30, 0.6)):
        mine.add(iteration, iteration / 10, evaluation(value))
    assert mine.summary_entries()["seconds_to"] == {"0.5": 3.0}
    again = targets(targets=[0.5], smooth=2)
    again.load_state_dict(mine.state_dict(), 20, seconds=0.0)
    assert again.summary_entries()["seconds_to"] == {"0.5": None}


def test_a_target_that_is_added_when_a_run_is_resumed_was_reached_before() -> None:
    former = targets()
    former.add(10, 1.0, evaluation(0.7))
    mine = targets(targets=[0.5])
    mine.load_state_dict(former.state_dict(), 12, seconds=1.5)
    assert mine.summary_entries()["seconds_to"] == {"0.5": 1.0}
    of_an_earlier_version = targets(targets=[0.5])
    of_an_earlier_version.load_state_dict(None, 12, seconds=1.5)
    of_an_earlier_version.add(20, 1.0, evaluation(0.7))
    assert of_an_earlier_version.summary_entries()["seconds_to"] == {"0.5": 2.5}


def test_the_mean_of_three_equal_values_is_that_value() -> None:
    for hundredths in range(101):
        mine = targets(targets=[hundredths / 100], smooth=3)
        for number in range(3):
            mine.add(number, float(number), evaluation(hundredths / 100))
        assert mine.summary_entries()["seconds_to"] == {repr(hundredths / 100): 2.0}


@pytest.mark.parametrize("given_targets", [[0.5, 0.5], [math.nan], [math.inf]])
def test_targets_that_are_no_numbers_or_given_twice_are_refused(given_targets: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"^evaluate\.targets: got .*, expected finite numbers, each once"):
        targets(targets=given_targets)


def test_targets_of_what_is_never_evaluated_are_refused() -> None:
    config = parse_config({"evaluate": {"targets": [0.5]}})
    with pytest.raises(ConfigError, match=r"^evaluate\.targets: got \[0\.5\], but nothing is evaluated with synthetic"):
        check_choice(config, evaluated=False)
    check_choice(config, evaluated=True)


def test_a_ticket_of_local_steps_is_as_many_gradients() -> None:
    config = parse_config({"evaluate": {"targets": [0.5]}, "algorithm": {"name": "local_sgd", "local_steps": 3}})
    mine = Targets(config, lambda name: TaskMetric(name, "", higher_is_better=name != "loss"))
    mine.add(10, 1.0, evaluation(0.6, validation=0.4))
    mine.add(20, 2.0, evaluation(0.6, validation=0.5))
    found = mine.summary_entries()
    assert (found["gradients_to"], found["val_gradients_to"]) == ({"0.5": 30}, {"0.5": 60})


def test_seconds_of_another_clock_are_not_added() -> None:
    """A live run without targets may continue a simulation; what continues that has no seconds either way."""
    simulated, live = (parse_config({"runtime": {"name": name}}) for name in ("sim", "rpc"))
    counted = [replace(each, evaluate=replace(each.evaluate, targets=[0.5])) for each in (simulated, live)]
    kept = [targets_of(each) for each in (simulated, live)]
    kept[1].load_state_dict(kept[0].state_dict(), 0, seconds=3.0)
    for config, then, state in (
        (counted[1], simulated, kept[0].state_dict()),
        (counted[0], live, None),
        (counted[1], live, kept[1].state_dict()),
        (counted[0], live, kept[1].state_dict()),
    ):
        with pytest.raises(ConfigError, match=r"evaluate\.targets: got \[0\.5\] in a run of (virtual|real) seconds"):
            check_clock(config, then, state, Path("checkpoint"))
    check_clock(counted[0], simulated, kept[0].state_dict(), Path())
    check_clock(counted[1], live, None, Path())
