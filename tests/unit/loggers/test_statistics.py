"""Statistics and metrics against figures computed by hand."""

from __future__ import annotations

import dataclasses

import pytest

from ormo_rpc.loggers.metrics import METRICS, Measurements, Metrics, Rows, measure, metric, row_of
from ormo_rpc.loggers.statistics import Statistics
from ormo_rpc.server.events import Event, Kind
from ormo_rpc.worker.evaluation import Evaluation
from tests.support.events import apply_event


def observed(*events: Event) -> Statistics:
    """Statistics of some events."""
    statistics = Statistics()
    for event in events:
        statistics.observe(event)
    return statistics


def test_statistics_of_a_resumed_run_by_hand() -> None:
    statistics = observed(
        apply_event(4, 0, 2, loss=3.0),  # resumed at iteration 4
        apply_event(5, 1, 0),
        Event(Kind.discard, 0.0, {"worker": 1, "delay": 9}),
        apply_event(6, 1, 5, loss=53.0),
        Event(Kind.repeat, 0.0, {"worker": 0}),
        Event(Kind.issue, 0.0, {"worker": 0}),
    )
    assert (statistics.iterations, statistics.applied, statistics.gradients_computed) == (7, 3, 4)
    assert (statistics.discarded, statistics.repeated) == (1, 1)
    assert statistics.pushes_per_worker == {0: 1, 1: 3}
    assert statistics.delay_sum_per_worker == {0: 2, 1: 5}  # of applied gradients
    assert statistics.delay_mean == pytest.approx(7 / 3)  # (2 + 0 + 5) / 3
    assert statistics.delay_max == 5
    assert statistics.delay_counts() == [1, 0, 1, 0, 0, 1]
    assert [statistics.delay_quantile(fraction) for fraction in (0.3, 0.5, 0.99)] == [0, 2, 5]
    assert statistics.loss == pytest.approx(4.0)  # 3 + (53 - 3) / 50


def test_statistics_before_the_first_event() -> None:
    statistics = Statistics()
    assert (statistics.delay_mean, statistics.delay_max, statistics.delay_quantile(0.5)) == (0.0, 0, 0)
    assert (statistics.loss, statistics.delay_counts()) == (None, [0])


def test_statistics_continue_from_their_state() -> None:
    half = observed(apply_event(0, 0, 0, loss=1.0), apply_event(1, 1, 1, loss=2.0))
    again = Statistics()
    again.load_state_dict(half.state_dict())
    for statistics in (half, again):
        statistics.observe(apply_event(2, 1, 2, loss=3.0))
    assert half == again


AT = Measurements(
    statistics=observed(*(apply_event(n, 0, delay, loss=0.5) for n, delay in enumerate((0, 1, 2)))),
    evaluation=Evaluation(loss=0.25, accuracy=0.875),
    seconds=0.9,
    applied=3,
    extra={"lock_held_seconds": 0.12345678},
)


def test_rows_have_the_metrics_that_are_declared_for_them_and_were_measured() -> None:
    assert row_of(AT, Rows.interval) == {
        "train_loss": 0.5,
        "updates_per_second": 3.33,  # 3 / 0.9
        "delay_mean": 1.0,
        "delay_max": 2,
        "lock_held_seconds": 0.123457,
    }
    assert row_of(AT, Rows.evaluation) == {"test_loss": 0.25, "test_accuracy": 0.875}


def test_the_summary_has_every_metric_unrounded() -> None:
    measured = measure(AT)
    assert list(measured) == list(METRICS)
    assert measured["updates_per_second"] == 3 / 0.9
    assert (measured["lock_held_seconds"], measured["lock_wait_seconds"]) == (0.12345678, None)
    assert Metrics(**measured).pushes_per_worker == {"0": 3}


def test_a_metric_is_shown_in_the_form_that_it_declares() -> None:
    @dataclasses.dataclass(kw_only=True)
    class More(Metrics):
        waste: float | None = metric("discarded gradients", lambda at: at.statistics.discarded, bar="waste", form=".1%")

    declared = {field.name: field.metadata["metric"] for field in dataclasses.fields(More)}["waste"]
    assert (declared.bar, declared.shown(0.125), declared.value(AT)) == ("waste", "12.5%", 0)
