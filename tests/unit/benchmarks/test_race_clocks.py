"""The clocks of the race against the simulator and closed forms."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from experiments.race import clocks
from experiments.race.contenders import CONTENDERS, draws, record, round_ends
from experiments.race.runs import Store, simulate
from experiments.race.setup import SETTINGS
from ormo_rpc import train
from ormo_rpc.composing import compose
from ormo_rpc.storage.run_directory import read_trace
from tests.support.race import DIGITS, SMALL


@pytest.mark.parametrize(
    ("setting", "workers", "of_ddp", "of_m_sync"),
    [
        ("one_slow", 4, 0.129, 0.97),
        ("one_slow", 16, 0.106, 0.99),
        ("exponential", 4, 0.65, 0.72),
        ("exponential", 16, 0.46, 0.66),
        ("half_slow", 4, 0.5, 0.75),
        ("none", 16, 1.0, 1.0),
    ],
)
def test_ideals_have_their_closed_forms(setting: str, workers: int, of_ddp: float, of_m_sync: float) -> None:
    # one_slow, K = 4: rounds of 10 give 4 gradients, 3 fast workers and a slow one give 3.1 in 1: 1/3.1 / (10/4) = 0.129.
    assert clocks.ideal(setting, workers) == pytest.approx(of_ddp, abs=0.0051)
    assert clocks.ideal_of_best_m(setting, workers) == pytest.approx(of_m_sync, abs=0.0051)


@pytest.mark.parametrize("setting", SETTINGS)
def test_closed_forms_agree_with_the_draws_of_the_simulator(setting: str) -> None:
    draw, rounds = draws(setting, 4, 0), 1500
    times = [sorted(draw(worker) / 0.1 for worker in range(4)) for _ in range(rounds)]
    means = [statistics.fmean(each) for each in zip(*times, strict=True)]
    assert means == pytest.approx([clocks.expected_smallest(setting, 4, m) for m in range(1, 5)], rel=0.05)
    assert math.fsum(means) == pytest.approx(math.fsum(clocks.mean_slowdowns(setting, 4)), rel=0.05)
    config = compose(("workers=4", f"heterogeneity={setting}"))
    assert clocks.mean_slowdowns(setting, 4) == pytest.approx([config.mean_slowdown(worker) for worker in range(4)])


def simulated(tmp_path: Path, *overrides: str) -> float:
    """The virtual seconds of a simulation of noise alone."""
    quiet = ("runtime=sim", "runtime.gradient=noise", "runtime.dimension=2", "logger=none", "logger.progress=false")
    summary = train((*quiet, "checkpoint.every_seconds=0", *overrides), run_dir=tmp_path / "run")
    return summary["virtual_seconds"]


@pytest.mark.parametrize("setting", SETTINGS)
def test_rounds_end_when_they_do_in_the_simulator(setting: str, tmp_path: Path) -> None:
    (variant,) = CONTENDERS["ddp"].variants(4)
    expected = simulated(
        tmp_path, *variant.overrides, "workers=4", f"heterogeneity={setting}", "seed=5", "train.max_iterations=80"
    )
    assert round_ends(variant, setting, 4, 5, 20, batch_size=64)[-1] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("cancel", [False, True])
@pytest.mark.parametrize("setting", ["one_slow", "exponential", "half_slow"])
def test_rounds_of_the_first_workers_end_when_they_do_in_the_simulator(setting: str, cancel: bool, tmp_path: Path) -> None:
    rule = ("algorithm=m_sync", "algorithm.m=3", f"algorithm.cancel={cancel}", "train.max_iterations=120")
    simulated(tmp_path, *rule, "workers=5", f"heterogeneity={setting}", "seed=5")
    applied = [event["seconds"] for event in read_trace(tmp_path / "run")[1] if event["event"] == "apply"]
    # The last rounds are others: there are no tickets left for all workers. A trace has microseconds.
    ends = clocks.first(3, cancel=cancel)(draws(setting, 5, 5), 5, 36)
    assert ends == pytest.approx(applied[2:108:3], abs=1e-6)


@pytest.mark.slow
def test_rounds_have_the_updates_of_m_sync() -> None:
    job = (*DIGITS, "train.epochs=2", "evaluate.every=16", "train.lr=0.2", "workers=4")
    (variant,) = CONTENDERS["ddp"].variants(4)
    first, second = (simulate((*job, *rule), "test") for rule in (variant.overrides, ("algorithm=m_sync",)))
    assert first.iterations == second.iterations
    assert first.accuracy == pytest.approx(second.accuracy, abs=2 / 360)  # scans at a boundary fall to either side by rounding
    assert len(set(first.accuracy)) > 3, "it learns"


@pytest.mark.parametrize(("setting", "batch"), [("one_slow", 64), ("one_slow", 10), ("exponential", 64), ("half_slow", 64)])
def test_rounds_of_proportional_parts_end_when_they_do_in_the_simulator(setting: str, batch: int, tmp_path: Path) -> None:
    (variant,) = CONTENDERS["ddp_proportional"].variants(4)
    job = ("workers=4", f"train.batch_size={batch}", "runtime.shares=proportional", "train.max_iterations=80")
    expected = simulated(tmp_path, *variant.overrides, *job, f"heterogeneity={setting}", "seed=5")
    assert round_ends(variant, setting, 4, 5, 20, batch_size=batch)[-1] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("setting", ["one_slow", "exponential"])
def test_rounds_of_local_steps_take_a_time_for_each(setting: str, tmp_path: Path) -> None:
    variant = CONTENDERS["local_sgd"].variants(4)[0]
    expected = simulated(
        tmp_path, *variant.overrides, "workers=4", f"heterogeneity={setting}", "seed=5", "train.max_iterations=80"
    )
    found = round_ends(variant, setting, 4, 5, 20, batch_size=64)[-1]
    if setting == "one_slow":
        assert found == pytest.approx(expected, abs=1e-9)
    else:
        assert found < expected, "four draws for a ticket, where the simulator makes one"


@pytest.mark.slow
def test_an_accuracy_that_is_shared_between_settings_is_that_of_the_simulator(tmp_path: Path) -> None:
    (variant,) = CONTENDERS["ddp"].variants(4)
    cell: dict[str, Any] = {"workers": 4, "rate": 0.2, "seed": 3, "split": "test", "limit": math.inf}
    found = record(variant, SMALL, Store(tmp_path, "data"), setting="exponential", **cell)
    own = simulate(
        (
            *(*DIGITS, "train.epochs=2", "train.batch_size=32", "evaluate.every=8", *variant.overrides, "workers=4"),
            *("heterogeneity=exponential", "train.lr=0.2", "seed=3"),
        ),
        "test",
    )
    assert (found.accuracy, found.iterations) == (own.accuracy, own.iterations)
    assert found.seconds == pytest.approx(own.seconds, abs=5.1e-5)  # rows of metrics have four digits


@pytest.mark.slow
@pytest.mark.parametrize(("split", "key"), [("test", "test_accuracy"), ("validation", "val_accuracy")])
def test_a_run_has_the_accuracies_of_an_ordinary_one(split: str, key: str, tmp_path: Path) -> None:
    overrides = (*DIGITS, "train.epochs=1", "workers=2", "heterogeneity=gamma", "evaluate.every=10")
    quiet = ("runtime=sim", "logger=none", "logger.progress=false")
    summary = train((*quiet, *overrides), run_dir=tmp_path / "run")
    found = simulate(overrides, split)
    assert found.accuracy[-1] == pytest.approx(summary[key], abs=1e-4)
    assert found.seconds[-1] == pytest.approx(summary["virtual_seconds"], abs=5.1e-5)
