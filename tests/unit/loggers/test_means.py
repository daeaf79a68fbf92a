"""Means of pushed metrics against sums over the list of all that was pushed."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ormo_rpc.loggers.means import MOST_NAMES, Means
from ormo_rpc.loggers.metrics import Measurements, Rows, measure_by_name, row_of
from ormo_rpc.loggers.statistics import Statistics
from ormo_rpc.server.events import Event, Kind
from tests.support.events import apply_event

NUMBER = st.none() | st.floats(-1e6, 1e6)
VALUE = NUMBER | st.tuples(NUMBER, st.integers(0, 100).map(float)).map(list)
METRICS = st.dictionaries(st.sampled_from(["tokens", "hits", "norm"]), VALUE)
STEPS = st.lists(METRICS | st.sampled_from(["row", "restart", "discard"]), max_size=30)


def expected(pushed: list[Mapping[str, Any]]) -> dict[str, float]:
    """The means by the definition."""
    pairs: dict[str, list[tuple[float, float]]] = {}
    for metrics in pushed:
        for name, value in metrics.items():
            pair = tuple(value) if isinstance(value, list) else (value, 1.0)
            if None not in pair:
                pairs.setdefault(f"train_{name}", []).append(pair)
    sums = {name: [math.fsum(column) for column in zip(*found, strict=True)] for name, found in pairs.items()}
    return {name: total / count for name, (total, count) in sums.items() if count}


def at(statistics: Statistics) -> Measurements:
    return Measurements(statistics=statistics, evaluation=None, seconds=0.0, applied=0, extra={})


@given(STEPS)
def test_means_of_rows_and_of_the_run_are_those_of_their_gradients(steps: list[Any]) -> None:
    statistics = Statistics()
    everything: list[Mapping[str, Any]] = []
    since_row: list[Mapping[str, Any]] = []
    for number, step in enumerate(steps):
        if step == "discard":
            statistics.observe(Event(Kind.discard, 0.0, {"worker": 0}))
        elif step == "restart":  # from a checkpoint that was just written
            file = io.BytesIO()
            torch.save(statistics.state_dict(), file)
            file.seek(0)
            statistics = Statistics()
            statistics.load_state_dict(torch.load(file, weights_only=True))
        elif step == "row":
            found = {name: value for name, value in row_of(at(statistics), Rows.interval).items() if name.startswith("train_")}
            assert found == pytest.approx(expected(since_row), rel=1e-9, abs=1e-6)
            statistics.recent_metrics.clear()
            since_row.clear()
        else:
            statistics.observe(apply_event(number, 0, 0, metrics=step))
            everything.append(step)
            since_row.append(step)
    assert measure_by_name(at(statistics)) == pytest.approx(expected(everything), rel=1e-9, abs=1e-6)


def test_a_state_is_a_copy_and_one_without_metrics_goes_on() -> None:
    statistics = Statistics()
    statistics.observe(apply_event(0, 0, 0, metrics={"tokens": 2.0}))
    state = statistics.state_dict()
    statistics.observe(apply_event(1, 0, 0, metrics={"tokens": 4.0}))
    assert state["metrics"] == {"tokens": (2.0, 1.0)}
    former = {name: value for name, value in state.items() if "metrics" not in name}
    again = Statistics()
    again.load_state_dict(former)
    again.observe(apply_event(1, 0, 0, metrics={"tokens": 4.0}))
    assert again.metrics.means() == {"tokens": 4.0}


def test_a_name_for_each_gradient_does_not_fill_the_memory() -> None:
    means = Means()
    for number in range(2 * MOST_NAMES):
        means.add({f"loss_{number}": 1.0})
    means.add({"loss_3": 3.0})
    assert len(means) == MOST_NAMES
    assert means.means()["loss_3"] == 2.0


def test_a_sum_that_overflows_is_no_mean() -> None:
    assert Means().add({"a": 1.7e308, "b": 1.0}).add({"a": 1.7e308}).means() == {"b": 1.0}
