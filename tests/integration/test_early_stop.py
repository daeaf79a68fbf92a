"""Simulated runs that are evaluated often, stop early, and keep their best model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from ormo_rpc import ConfigError, train
from ormo_rpc.config.parsing import load_config
from ormo_rpc.errors import one_line
from ormo_rpc.evaluate import evaluate_checkpoint
from ormo_rpc.runtimes.configured import build_module
from ormo_rpc.runtimes.job import Job
from ormo_rpc.storage import best, checkpoint
from ormo_rpc.storage.checkpoint import complete
from ormo_rpc.storage.run_directory import read_metrics, read_trace

DIGITS = ("runtime=sim", "logger=none", "model.hidden=8", "train.max_iterations=200", "workers=3", "heterogeneity=gamma")
OFTEN = ("evaluate.every=10", "dataset.validation=0.2")
NEVER_BETTER = ("evaluate.patience=2", "evaluate.min_delta=100")
"""The first evaluation is the best, so that it ends at the third one."""


def three_splits(splits: int = 3) -> tuple[TensorDataset, ...]:
    """Train and test, and with three a validation split of its own."""
    data = TensorDataset(torch.randn(80, 3, generator=torch.Generator().manual_seed(0)), torch.arange(80) % 2)
    return (data, data, TensorDataset(*data[:20]))[:splits]


def values(run_dir: Path, metric: str) -> list[tuple[int, float]]:
    return [(row["iteration"], row[metric]) for row in read_metrics(run_dir) if metric in row]


def test_evaluations_are_made_as_often_as_they_are_asked_for(tmp_path: Path) -> None:
    summary = train([*DIGITS, *OFTEN, "train.max_iterations=35"], run_dir=tmp_path / "run")
    assert [iteration for iteration, _ in values(tmp_path / "run", "val_loss")] == [10, 20, 30, 35]
    assert (summary["best"], summary["evaluated"]) == (None, "parameters")
    assert not (tmp_path / "run" / "checkpoints" / "best").exists()


def test_a_run_stops_early_in_order_and_says_why(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    summary = train([*DIGITS, *OFTEN, *NEVER_BETTER], run_dir=run_dir)
    first = values(run_dir, "val_loss")[0]
    assert summary["status"] == "completed"
    # Three workers: three gradients are out when the third evaluation has ended it, and they are applied.
    assert summary["iterations"] == 33
    assert summary["reason"].startswith(
        f"evaluate.patience=2: for 2 evaluations no val_loss was better than the {first[1]:.6g} of iteration 10 by more than "
        "evaluate.min_delta=100: ended after 0."
    )
    assert [iteration for iteration, _ in values(run_dir, "val_loss")] == [10, 20, 30, 33]
    events = read_trace(run_dir)[1]
    assert [event["iteration"] for event in events if event["event"] == "finish"] == [30]
    applied = [event["ticket"] for event in events if event["event"] == "apply"]
    assert sorted(applied) == list(range(33)), "each ticket that was handed out is applied once"
    again = train(["runtime=replay", f"replay.run={run_dir}", "logger=none"], run_dir=tmp_path / "again")
    assert (again["identical"], again["reason"], again["best"]) == (True, summary["reason"], summary["best"])


@pytest.mark.parametrize("scheduler", ["async", "sync", "partial", "ssp"])
def test_workers_that_wait_join_or_leave_are_no_obstacle(scheduler: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    membership = ("runtime.joins={9: 0.5}", "runtime.leaves={1: 0.7}", f"scheduler={scheduler}")
    summary = train([*DIGITS, *OFTEN, *NEVER_BETTER, *membership, "runtime.compute_seconds=0.2"], run_dir=run_dir)
    assert (summary["status"], summary["reason"][:19]) == ("completed", "evaluate.patience=2")
    events = read_trace(run_dir)[1]
    assert {"join", "leave", "finish"} <= {event["event"] for event in events}
    assert 30 <= summary["iterations"] <= 33
    tickets = [event["ticket"] for event in events if event["event"] == "apply"]
    assert sorted(tickets) == sorted(set(tickets))
    again = train(["runtime=replay", f"replay.run={run_dir}", "logger=none"], run_dir=tmp_path / "again")
    assert again["identical"] is True


@pytest.mark.parametrize("metric", [None, "val_accuracy", "test_loss"])
def test_the_best_model_is_that_of_the_best_evaluation(metric: str | None, tmp_path: Path) -> None:
    run_dir, name = tmp_path / "run", metric or "val_loss"
    options = (*OFTEN, "checkpoint.best=true", "train.lr=0.3", f"optimized_metric={metric or 'null'}")
    summary = train([*DIGITS, *options], run_dir=run_dir)
    found = values(run_dir, name)
    sign = -1 if name == "val_accuracy" else 1
    iteration, value = min(found, key=lambda each: sign * each[1])  # the first of equal ones
    folder = run_dir / "checkpoints" / "best"
    assert summary["best"] == {"metric": name, "value": value, "iteration": iteration, "path": str(folder)}
    assert len(found) == 20
    assert iteration < found[-1][0], "not simply the last"
    split, _, key = name.partition("_")
    _, result = evaluate_checkpoint(folder)
    again = result.test if split == "test" else result.validation
    assert again is not None
    assert again[key] == value
    # A plain state_dict, of a plain module.
    config = load_config(folder / "config.yaml")
    module = build_module(config, Job(config).data)
    module.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    assert {file.name for file in folder.iterdir()} == {"model.pt", "buffers.pt", "config.yaml", "manifest.json"}
    record = best.read(run_dir)
    assert record is not None
    assert (record.iteration, record.value, record.evaluated) == (iteration, value, "parameters")


class WithNorm(nn.Sequential):
    """Has buffers of two dtypes."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__(nn.BatchNorm1d(input_shape[0]), nn.Linear(input_shape[0], num_classes))


def test_the_best_model_has_the_buffers_of_its_evaluation(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    options = {
        "runtime": "sim",
        "logger": "none",
        "workers": 2,
        "model": {"_target_": f"{__name__}.WithNorm"},
        "dataset": {"_target_": f"{__name__}.three_splits"},
        "train": {"batch_size": 8, "epochs": 3, "lr": 0.3},
        "evaluate": {"every": 3, "patience": 3},
    }
    summary = train(options, run_dir=run_dir)
    folder = run_dir / "checkpoints" / "best"
    assert summary["best"]["path"] == str(folder)
    module = WithNorm((3,), 2)
    module.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    inputs, targets = (three_splits()[2].tensors[n] for n in (0, 1))
    loss = nn.functional.cross_entropy(module.eval()(inputs), targets).item()
    assert summary["best"]["value"] == pytest.approx(loss, rel=1e-6)
    assert module[0].num_batches_tracked == summary["best"]["iteration"]
    _, result = evaluate_checkpoint(folder)
    assert result.validation is not None
    assert result.validation["loss"] == summary["best"]["value"]


def test_the_best_model_is_the_moving_average_where_that_is_evaluated(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    options = (
        "evaluate.ema=0.9",
        "checkpoint.best=true",
        "train.max_iterations=40",
        "checkpoint.every=10",
        "checkpoint.keep=9",
    )
    summary = train([*DIGITS, *OFTEN, *options], run_dir=run_dir)
    record = best.read(run_dir)
    assert record is not None
    assert record.evaluated == summary["evaluated"] == "ema"
    at = run_dir / "checkpoints" / f"iteration_{record.iteration:09d}"
    kept, same = (torch.load(file, weights_only=True) for file in (run_dir / "checkpoints/best/model.pt", at / "model_ema.pt"))
    assert all(torch.equal(kept[name], same[name]) for name in same)


def test_an_interrupted_run_goes_on_counting_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    options = (*DIGITS, *OFTEN, "evaluate.patience=3", "evaluate.min_delta=0.2", "checkpoint.every=7", "checkpoint.keep=100")
    whole = train(options, run_dir=tmp_path / "whole")
    assert whole["iterations"] < 200
    assert whole["reason"].startswith("evaluate.patience=3")
    stop = next(event["iteration"] for event in read_trace(tmp_path / "whole")[1] if event["event"] == "finish")
    before = [source for source in complete(tmp_path / "whole") if checkpoint.iteration_of(source) < stop]
    for source in (before[0], before[-2], before[-1]):
        resumed = train([*options, f"checkpoint.resume={source}"], run_dir=tmp_path / source.name)
        for key in ("iterations", "final_params_sha256", "reason"):
            assert resumed[key] == whole[key]
        assert {**resumed["best"], "path": ""} == {**whole["best"], "path": ""}
        assert (tmp_path / source.name / "checkpoints" / "best" / "model.pt").exists()


def test_a_run_that_has_stopped_early_is_not_resumed_for_nothing(tmp_path: Path) -> None:
    options = (*DIGITS, *OFTEN, "evaluate.min_delta=100", f"checkpoint.resume={tmp_path / 'run'}")
    train([*DIGITS, *OFTEN, *NEVER_BETTER], run_dir=tmp_path / "run")
    with pytest.raises(
        ConfigError, match=r"^checkpoint\.resume: nothing is left to do: evaluate\.patience=2: .*; raise it, or "
    ):
        train([*options, "evaluate.patience=2"], run_dir=tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    more = train([*options, "evaluate.patience=5"], run_dir=tmp_path / "more")
    # Evaluations of 10 to 30 and 33 were there, so that those of 40 and 50 make it five that were not better.
    assert more["iterations"] == 53
    free = train([*options, "evaluate.patience=null", "train.max_iterations=60"], run_dir=tmp_path / "free")
    assert (free["iterations"], free["reason"]) == (60, None)


def test_the_best_model_is_nothing_to_resume_from(tmp_path: Path) -> None:
    train([*DIGITS, *OFTEN, "checkpoint.best=true", "train.max_iterations=20"], run_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"^checkpoint\.resume: got .*/best, which has a model and not the state of a server"):
        train([*DIGITS, f"checkpoint.resume={tmp_path / 'run/checkpoints/best'}"], run_dir=tmp_path / "refused")


def test_a_best_model_that_cannot_be_written_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Path:
        raise OSError(28, "No space left on device", "model.pt")

    monkeypatch.setattr(best, "write", full)
    with pytest.raises(OSError, match="No space left") as caught:
        train([*DIGITS, *OFTEN, "checkpoint.best=true"], run_dir=tmp_path / "run")
    assert "No space left on device" in one_line(caught.value)


def test_without_a_validation_split_the_choice_by_the_test_split_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train([*DIGITS, "checkpoint.best=true", "train.max_iterations=10"], run_dir=tmp_path / "run")
    assert [record.getMessage() for record in caplog.records if "chosen by the test split (test_loss)" in record.getMessage()]
    assert math.isfinite(values(tmp_path / "run", "test_loss")[0][1])


@pytest.mark.parametrize("metric", ["val_loss", "val_accuracy"])
def test_a_validation_split_of_the_users_own_decides(metric: str, tmp_path: Path) -> None:
    keys = [*DIGITS, f"dataset._target_={__name__}.three_splits", "evaluate.every=10", *NEVER_BETTER]
    chosen = [] if metric == "val_loss" else [f"optimized_metric={metric}"]
    summary = train([*keys, *chosen], run_dir=tmp_path / "run")
    assert summary["best"]["metric"] == metric
    assert f"no {metric} was better" in summary["reason"]
    again = train(["runtime=replay", f"replay.run={tmp_path / 'run'}", "logger=none"], run_dir=tmp_path / "again")
    assert (again["identical"], again["best"]) == (True, summary["best"])
    with pytest.raises(ConfigError, match=rf"^checkpoint\.resume: nothing is left to do: .* no {metric} was better"):
        train([*keys, *chosen, f"checkpoint.resume={tmp_path / 'run'}"], run_dir=tmp_path / "resumed")


@pytest.mark.parametrize("keys", [["evaluate.patience=2"], ["optimized_metric=val_accuracy"]])
def test_a_data_set_of_the_users_own_without_a_validation_split_is_told_so(keys: list[str], tmp_path: Path) -> None:
    data = [f"dataset._target_={__name__}.three_splits", "+dataset.splits=2"]
    with pytest.raises(ConfigError, match=r"without a validation split; set dataset\.validation=0\.1, (or )?return one beside"):
        train([*DIGITS, *data, *keys], run_dir=tmp_path / "run")
