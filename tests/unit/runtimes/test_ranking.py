"""Early stops against a slow reference, and what cannot be chosen by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ormo_rpc.config.parsing import parse_config
from ormo_rpc.config.schema import Config
from ormo_rpc.errors import ConfigError
from ormo_rpc.runtimes.ranking import Ranking, check_choice
from ormo_rpc.tasks.metrics import metric_named
from ormo_rpc.worker.evaluation import Evaluation

VALIDATION: dict[str, Any] = {"validation": 0.1}


def config(metric: str | None = None, **evaluate: Any) -> Config:
    return parse_config({"workers": 2, "optimized_metric": metric, "dataset": VALIDATION, "evaluate": evaluate})


def ranking(metric: str | None = None, **evaluate: Any) -> Ranking:
    return Ranking(config(metric, **evaluate), metric_named)


def evaluation(value: float, metric: str = "loss") -> Evaluation:
    return Evaluation({"loss": 7.0, "accuracy": 0.5}, {"loss": 7.0, "accuracy": 0.5, metric: value})


def stops_after(values: Sequence[float], patience: int, delta: float, *, higher: bool) -> int | None:
    """The number of evaluations after which patience is exhausted, by looking at all of them again each time."""
    for count in range(1, len(values) + 1):
        best, at = None, 0
        for number, value in enumerate(values[:count], 1):
            improves = best is None or (value > best + delta if higher else value < best - delta)
            if improves and not math.isnan(value):
                best, at = value, number
        if count - at >= patience:
            return count
    return None


@given(
    values=st.lists(st.one_of(st.integers(0, 6).map(float), st.just(math.nan), st.just(math.inf)), max_size=20),
    patience=st.integers(1, 4),
    delta=st.sampled_from([0.0, 1.0, 2.0]),
    higher=st.booleans(),
)
def test_a_run_stops_when_it_is_exhausted_and_not_before(
    values: list[float], patience: int, delta: float, *, higher: bool
) -> None:
    metric = "accuracy" if higher else "loss"
    mine = ranking(f"val_{metric}", patience=patience, min_delta=delta)
    found = None
    for number, value in enumerate(values, 1):
        mine.add(10 * number, evaluation(value, metric))
        if mine.reason is not None:
            found = number
            break
    assert found == stops_after(values, patience, delta, higher=higher)


def test_the_reason_names_metric_value_and_iteration() -> None:
    mine = ranking(patience=2, min_delta=0.25)
    for iteration, value in ((5, 0.5), (10, 0.375), (15, 0.3)):
        mine.add(iteration, evaluation(value))
    assert mine.reason == (
        "evaluate.patience=2: for 2 evaluations no val_loss was better than the 0.5 of iteration 5 by more than "
        "evaluate.min_delta=0.25"
    )
    never = ranking(patience=1)
    never.add(5, evaluation(math.nan))
    assert never.reason == "evaluate.patience=1: for 1 evaluations no val_loss ever was a number"


def test_without_patience_nothing_stops() -> None:
    mine = ranking()
    for iteration in range(20):
        mine.add(iteration, evaluation(1.0))
    assert mine.reason is None


def test_it_goes_on_from_a_state_up_to_an_iteration_and_by_the_same_metric() -> None:
    whole = ranking(patience=2)
    for iteration, value in ((5, 0.5), (10, 0.6), (15, 0.7)):
        whole.add(iteration, evaluation(value))
    assert whole.reason is not None
    for metric, upto, stopped in ((None, 15, True), (None, 14, False), ("val_accuracy", 15, False)):
        again = ranking(metric, patience=2)
        again.load_state_dict(whole.state_dict(), upto)
        assert (again.reason is not None) is stopped
    again = ranking(patience=2)
    again.load_state_dict(None, 15)  # of a checkpoint of an earlier version
    assert again.state_dict()["values"] == []


def test_an_evaluation_of_an_iteration_replaces_what_a_crash_has_undone() -> None:
    mine = ranking(patience=3)
    for iteration, value in ((5, 0.5), (10, 0.4), (15, 0.3), (10, 0.6)):
        mine.add(iteration, evaluation(value))
    assert mine.state_dict()["values"] == [[5, 0.5], [10, 0.6]]


def test_a_metric_that_an_evaluation_does_not_have_is_refused_with_those_that_it_has() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^optimized_metric: got val_dice, expected one of .*: test_loss, test_accuracy, val_loss, val_accuracy$",
    ):
        Ranking(_with_metric("val_dice"), metric_named).value_of(evaluation(1.0))


def _with_metric(name: str) -> Config:
    return parse_config({"dataset": VALIDATION, "optimized_metric": name})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"evaluate": {"patience": 3}},
            r"evaluate\.patience: got 3 without a validation split; set dataset\.validation=0\.1, return one beside train "
            r"and test, or set optimized_metric=test_",
        ),
        (
            {"evaluate": {"patience": 3}, "dataset": VALIDATION, "optimized_metric": "train_loss"},
            r"optimized_metric: got train_loss with evaluate\.patience, expected a metric of evaluations: val_loss, "
            r"val_accuracy, test_loss, test_accuracy$",
        ),
        (
            {"checkpoint": {"best": True}, "optimized_metric": "wall_seconds"},
            r"optimized_metric: got wall_seconds with checkpoint\.best, expected .*: test_loss, test_accuracy$",
        ),
    ],
)
def test_a_choice_that_evaluations_do_not_allow_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        check_choice(parse_config(values), evaluated=True)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"checkpoint": {"best": True}},
        {"evaluate": {"patience": 3}, "dataset": VALIDATION},
        {"evaluate": {"patience": 3}, "optimized_metric": "test_accuracy"},
    ],
)
def test_other_choices_are_made(values: dict[str, Any]) -> None:
    check_choice(parse_config(values), evaluated=True)


def test_what_is_never_evaluated_is_not_chosen_by() -> None:
    with pytest.raises(ConfigError, match=r"^checkpoint\.best: got true, but nothing is evaluated with synthetic gradients"):
        check_choice(parse_config({"checkpoint": {"best": True}}), evaluated=False)
    check_choice(Config(), evaluated=False)
