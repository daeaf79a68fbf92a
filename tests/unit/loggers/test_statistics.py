"""Statistics and metrics against figures computed by hand."""

from __future__ import annotations

import dataclasses

import pytest

from ormo_rpc.loggers.metrics import METRICS, Measurements, Metrics, Rows, measure, measure_by_name, metric, row_of
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
    assert statistics.delay_means() == {0: 2.0, 1: 2.5}  # 2 / 1 and (0 + 5) / 2
    assert statistics.delay_mean == pytest.approx(7 / 3)  # (2 + 0 + 5) / 3
    assert statistics.delay_max == 5
    assert statistics.delay_counts() == [1, 0, 1, 0, 0, 1]
    assert (statistics.elastic_mean, statistics.elastic_max) == (None, None)
    assert [statistics.delay_quantile(fraction) for fraction in (0.3, 0.5, 0.99)] == [0, 2, 5]
    for elastic in (0.5, None, 0.25):
        statistics.observe(dataclasses.replace(apply_event(7, 0, 1), elastic=elastic))
    assert (statistics.elastic_mean, statistics.elastic_max) == (0.375, 0.5)
    assert statistics.loss == pytest.approx(28.0)  # (3 + 53) / 2: all, as there are fewer than 50


def test_statistics_before_the_first_event() -> None:
    statistics = Statistics()
    assert (statistics.delay_mean, statistics.delay_max, statistics.delay_quantile(0.5)) == (0.0, 0, 0)
    assert (statistics.loss, statistics.delay_counts()) == (None, [0])


def test_the_loss_is_a_mean_over_all_gradients_until_there_are_fifty() -> None:
    losses = [float(number) for number in range(60)]
    statistics = Statistics()
    for number, loss in enumerate(losses):
        statistics.observe(apply_event(number, 0, 0, loss=loss))
        if number == 49:
            assert statistics.loss == pytest.approx(24.5)  # (0 + 49) / 2
    expected = 24.5
    for loss in losses[50:]:
        expected += (loss - expected) / 50
    assert statistics.loss == pytest.approx(expected)


def test_the_loss_at_the_start_is_that_of_the_smallest_stamp() -> None:
    statistics = observed(
        apply_event(7, 0, 2, loss=9.0),  # stamp 5
        apply_event(8, 1, 5, loss=1.0),  # stamp 3: the parameters were older
        apply_event(9, 0, 2, loss=9.0),
        apply_event(10, 2, 7, loss=2.0),  # stamp 3
        apply_event(11, 2, 8),  # stamp 3, without a loss
    )
    assert (statistics.start_stamp, statistics.start_loss, statistics.start_losses) == (3, 1.5, 2)
    resumed = Statistics()
    resumed.begin_as(statistics.state_dict())
    resumed.observe(apply_event(12, 0, 0, loss=70.0))
    assert (resumed.start_loss, resumed.loss, resumed.applied) == (1.5, 70.0, 1)


def test_statistics_of_an_earlier_version_go_on() -> None:
    """A checkpoint without the number of losses, and without the loss at the start."""
    new = ("losses", "start_loss", "start_losses", "start_stamp", "seconds")
    state = observed(*(apply_event(number, 0, 0, loss=4.0) for number in range(9))).state_dict()
    former = {key: value for key, value in state.items() if key not in new}
    for load in (Statistics.load_state_dict, Statistics.begin_as):
        statistics = Statistics()
        load(statistics, former)
        statistics.observe(apply_event(9, 0, 0, loss=14.0))
        assert (statistics.start_loss, statistics.start_stamp) == (14.0, 9)
        assert statistics.loss == pytest.approx(5.0 if statistics.applied == 10 else 14.0)  # 4 + (14 - 4) / 10


@pytest.mark.parametrize("discards", [0, 2])
def test_mean_delays_of_workers_go_on_from_an_earlier_version(discards: int) -> None:
    """Its state has the pushes of each worker, and of all together how many were discarded."""
    former = observed(
        *(apply_event(number, number % 2, 4) for number in range(6)),
        *(Event(Kind.discard, 0.0, {"worker": 1, "delay": 9}) for _ in range(discards)),
    ).state_dict()
    del former["applied_per_worker"]
    statistics = Statistics()
    statistics.load_state_dict(former)
    statistics.observe(apply_event(6, 0, 0))
    # Worker 0: (4 + 4 + 4 + 0) / 4. With discards it is not known of whose pushes they were, so that only the last one counts.
    assert statistics.delay_means() == ({0: 0.0} if discards else {0: 3.0, 1: 4.0})
    assert statistics.delay_mean == pytest.approx(24 / 7)


def test_statistics_continue_from_their_state() -> None:
    half = observed(apply_event(0, 0, 0, loss=1.0), apply_event(1, 1, 1, loss=2.0))
    again = Statistics()
    again.load_state_dict(half.state_dict())
    for statistics in (half, again):
        statistics.observe(apply_event(2, 1, 2, loss=3.0))
    assert half == again


AT = Measurements(
    statistics=observed(*(apply_event(n, 0, delay, loss=0.5) for n, delay in enumerate((0, 1, 2)))),
    evaluation=Evaluation({"loss": 0.25, "accuracy": 0.875}),
    seconds=0.9,
    applied=3,
    extra={"lock_held_seconds": 0.12345678},
)


def test_there_is_no_rate_over_no_time() -> None:
    assert "updates_per_second" not in row_of(dataclasses.replace(AT, seconds=0.0), Rows.interval)
    assert measure(dataclasses.replace(AT, seconds=0.0))["updates_per_second"] is None


def test_rows_have_the_metrics_that_are_declared_for_them_and_were_measured() -> None:
    assert row_of(AT, Rows.interval) == {
        "train_loss": 0.5,
        "updates_per_second": 3.33,  # 3 / 0.9
        "delay_mean": 1.0,
        "delay_max": 2,
        "lock_held_seconds": 0.123457,
    }
    assert row_of(AT, Rows.evaluation) == {"test_loss": 0.25, "test_accuracy": 0.875}


def test_metrics_of_any_task_are_in_rows_and_summary_under_their_names() -> None:
    evaluation = Evaluation({"loss": 2.0, "mae": 0.5, "hits": 0.125}, {"loss": 3.0, "mae": 0.25})
    at = dataclasses.replace(AT, evaluation=evaluation)
    others = {"test_mae": 0.5, "test_hits": 0.125, "val_mae": 0.25}
    assert row_of(at, Rows.evaluation) == {"test_loss": 2.0, "val_loss": 3.0, **others}
    assert not row_of(at, Rows.interval).keys() & others
    measured = measure(at)
    assert [measured[f"{split}_{name}"] for split in ("test", "val") for name in ("loss", "accuracy")] == [2.0, None, 3.0, None]
    assert measure_by_name(at) == others
    assert measure_by_name(dataclasses.replace(AT, evaluation=None)) == {}


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
