"""Simulated runs with targets: the moments are those of metrics.jsonl, in virtual time; resumed, replayed and reported."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from ormo_rpc import train
from ormo_rpc.errors import ConfigError
from ormo_rpc.report.runs import group_by_setting, load_runs
from ormo_rpc.report.table import rows
from ormo_rpc.storage.checkpoint import complete
from ormo_rpc.storage.run_directory import read_metrics

DIGITS = ("runtime=sim", "logger=none", "model.hidden=8", "workers=3", "heterogeneity=half_slow", "train.max_iterations=205")
TARGETS = ("evaluate.every=10", "evaluate.targets=[0.3, 0.6, 0.99]", "evaluate.smooth=3", "dataset.validation=0.2")
ENTRIES = ("target_metric", "seconds_to", "gradients_to", "val_seconds_to", "val_gradients_to")


def lines() -> tuple[TensorDataset, TensorDataset]:
    """Numbers that are a linear function of two others."""
    inputs = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(inputs, inputs @ torch.tensor([[1.0], [-2.0]]) + 0.5)
    return data, data


def entries(summary: dict[str, Any]) -> dict[str, Any]:
    return {name: summary[name] for name in ENTRIES}


def by_hand(run_dir: Path, key: str, targets: tuple[float, ...], smooth: int, sign: int = 1) -> tuple[dict[str, Any], ...]:
    """Seconds and iterations, from the rows of metrics.jsonl."""
    rows = [row for row in read_metrics(run_dir) if key in row]
    seconds: dict[str, Any] = {}
    gradients: dict[str, Any] = {}
    for target in targets:
        means = (
            (statistics.fmean(each[key] for each in rows[at - smooth : at]), rows[at - 1])
            for at in range(smooth, len(rows) + 1)
        )
        found = next((row for mean, row in means if sign * mean >= sign * target), None)
        seconds[repr(target)] = None if found is None else found["seconds"]
        gradients[repr(target)] = None if found is None else found["iteration"]
    return seconds, gradients


@pytest.mark.slow
def test_the_moments_are_those_of_the_rows_and_last_over_resuming_and_replays(tmp_path: Path) -> None:
    whole = train([*DIGITS, *TARGETS, "checkpoint.every=45", "checkpoint.keep=9"], run_dir=tmp_path / "whole")
    assert whole["target_metric"] == "accuracy"
    for split, prefix in (("test", ""), ("val", "val_")):
        seconds, gradients = by_hand(tmp_path / "whole", f"{split}_accuracy", (0.3, 0.6, 0.99), 3)
        assert whole[f"{prefix}seconds_to"] == pytest.approx(seconds, abs=1e-4)
        assert whole[f"{prefix}gradients_to"] == gradients
        assert seconds["0.3"] < seconds["0.6"], "the run reaches two of its targets"
        assert gradients["0.99"] is None
    # Two workers give a gradient in 0.1 s, the third in 0.3: iteration 7 n + 7 is at 0.3 (n + 1) virtual seconds, whatever
    # evaluations take.
    at = whole["gradients_to"]["0.3"]
    assert whole["seconds_to"]["0.3"] == pytest.approx(0.3 * (at // 7) + (0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3)[at % 7])
    assert read_metrics(tmp_path / "whole")[-1]["iteration"] == 205, "the last evaluation is not on the grid"
    for number, source in enumerate(complete(tmp_path / "whole")[:-1]):
        again = train([*DIGITS, *TARGETS, f"checkpoint.resume={source}"], run_dir=tmp_path / f"resumed{number}")
        assert entries(again) == entries(whole)
    replayed = train(["runtime=replay", f"replay.run={tmp_path / 'whole'}", "logger=none"], run_dir=tmp_path / "replayed")
    assert replayed["identical"] is True
    assert entries(replayed) == entries(whole)
    other = train([*DIGITS, *TARGETS, "seed=1", "train.max_iterations=60"], run_dir=tmp_path / "other")
    assert other["seconds_to"]["0.6"] is None


@pytest.mark.slow
def test_a_run_that_goes_on_from_one_that_has_ended_counts_from_the_beginning(tmp_path: Path) -> None:
    """Its clock is its own, unlike that of a simulation that was interrupted; one more target is known from before."""
    keys = (*DIGITS[:-1], "dataset.validation=0.2", "evaluate.every=10")
    first = train([*keys, "train.max_iterations=65", "evaluate.targets=[0.85]"], run_dir=tmp_path / "first")
    more = ("train.max_iterations=205", "evaluate.targets=[0.3, 0.85]", f"checkpoint.resume={tmp_path / 'first'}")
    second = train([*keys, *more], run_dir=tmp_path / "second")
    assert first["seconds_to"] == {"0.85": None}
    (before, _), (after, iterations) = (by_hand(tmp_path / run, "test_accuracy", (0.3, 0.85), 1) for run in ("first", "second"))
    assert second["seconds_to"]["0.3"] == pytest.approx(before["0.3"], abs=1e-4)
    assert second["seconds_to"]["0.85"] == pytest.approx(first["training_seconds"] + after["0.85"], abs=1e-4)
    assert second["gradients_to"]["0.85"] == iterations["0.85"] > 65
    with pytest.raises(ConfigError, match="in a run of real seconds that continues"):
        train([*keys, *more, "runtime=rpc"], run_dir=tmp_path / "live")
    assert not (tmp_path / "live" / "trace.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("every", [18, 19, 20])
def test_targets_that_are_given_to_a_resumed_simulation_count_from_its_beginning(every: int, tmp_path: Path) -> None:
    """A checkpoint has the evaluation before it, however near, and the resumed run makes no further one."""
    keys = (*DIGITS[:-1], "train.epochs=3", "checkpoint.keep=9", "train.batch_size=80")
    targets = "evaluate.targets=[0.05]"
    whole = train([*keys, targets], run_dir=tmp_path / "whole")
    train([*keys, f"checkpoint.every={every}"], run_dir=tmp_path / "first")
    sources = complete(tmp_path / "first")
    assert len(sources) == 3, "an epoch has 18 tickets"
    for number, source in enumerate(sources[:-1]):
        again = train([*keys, targets, f"checkpoint.resume={source}"], run_dir=tmp_path / f"resumed{number}")
        assert {**entries(again), "val_seconds_to": None} == {**entries(whole), "val_seconds_to": None}
        evaluated = [row["iteration"] for row in read_metrics(tmp_path / f"resumed{number}") if "test_accuracy" in row]
        assert evaluated == [iteration for iteration in (18, 36, 54) if iteration > (number + 1) * every]
    assert whole["gradients_to"] == {"0.05": 18}
    iterations = [row["iteration"] for row in read_metrics(tmp_path / "whole")]
    assert iterations == sorted(iterations), "rows of evaluations and of gradients are in their order"


@pytest.mark.slow
def test_the_report_has_a_column_for_each_target_and_says_how_many_runs_reached_it(tmp_path: Path) -> None:
    keys = (*DIGITS, *TARGETS[:1], "evaluate.targets=[0.3, 0.99]")
    runs = [train([*keys, f"seed={seed}"], run_dir=tmp_path / str(seed)) for seed in (0, 1)]
    header, row = rows(group_by_setting(load_runs([tmp_path])[0]))
    shown = dict(zip(header, row, strict=True))
    times = [each["seconds_to"]["0.3"] for each in runs]
    assert shown["virtual s to accuracy 0.3"].startswith(f"{statistics.fmean(times):.1f}")
    assert "virtual s to accuracy 0.99" not in shown, "nobody reached it"


def test_a_metric_that_is_better_lower_and_a_moving_average(tmp_path: Path) -> None:
    keys = ("task=regression", "dataset._target_=tests.integration.test_targets.lines", "model._target_=torch.nn.Linear")
    options = ("+model.in_features=2", "+model.out_features=1", "train.batch_size=5", "train.epochs=8", "train.lr=0.05")
    given = ("evaluate.targets=[0.5, 0.01, 0]", "evaluate.ema=0.5", *DIGITS[:2], "workers=2")
    summary = train([*keys, *options, *given], run_dir=tmp_path / "run")
    assert summary["evaluated"] == "ema"
    name = summary["target_metric"]
    assert not summary["metrics"][name]["higher_is_better"]
    seconds, gradients = by_hand(tmp_path / "run", f"test_{name}", (0.5, 0.01, 0.0), 1, sign=-1)
    assert summary["gradients_to"] == gradients
    assert summary["seconds_to"] == pytest.approx(seconds, abs=1e-4)
    assert gradients["0.5"] is not None
    assert gradients["0.0"] is None
    assert (summary["val_seconds_to"], summary["val_gradients_to"]) == (None, None), "there is no validation split"
