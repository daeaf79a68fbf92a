"""The metric of a sweep: what its jobs return, what a search gets, and which of them is named as the best."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.data import TensorDataset

from ormo_rpc import sweeps
from ormo_rpc.composing import compose
from ormo_rpc.errors import ConfigError
from ormo_rpc.runtimes import running
from ormo_rpc.storage.optimized_metric import higher_is_better, refuse_metric
from ormo_rpc.tasks.own_loop import OwnLoopTask
from tests.support.sweeps import SHORT, Launch, statuses

pytestmark = pytest.mark.slow  # hydra takes most of a second for each sweep
warns = pytest.mark.filterwarnings("ignore")  # optuna and sqlalchemy, of themselves
DISTANCE = "+task._target_=tests.support.error_task.Distance"


def with_validation() -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """A data set with a validation split of its own."""
    data = TensorDataset(torch.randn(80, 3, generator=torch.Generator().manual_seed(0)), torch.arange(80) % 2)
    return data, data, TensorDataset(*data[:20])


@pytest.mark.parametrize(
    ("overrides", "metric"),
    [
        ([], "test_loss"),
        (["dataset.validation=0.1"], "val_loss"),
        (["dataset.validation=100"], "val_loss"),
        (["dataset.validation=0.1", "optimized_metric=test_accuracy"], "test_accuracy"),
        ([f"dataset._target_={__name__}.with_validation"], "val_loss"),
    ],
)
def test_a_job_returns_its_validation_loss_else_its_test_loss(
    overrides: list[str], metric: str, launch: Launch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    returned: list[float | None] = []
    job = sweeps.run_job

    def observed(*arguments: Any) -> float | None:
        returned.append(job(*arguments))
        return returned[-1]

    monkeypatch.setattr(sweeps, "run_job", observed)
    assert launch("-m", *SHORT, *overrides, "seed=3") == 0
    assert returned == [json.loads((tmp_path / "sweep" / "0" / "summary.json").read_text())[metric]]
    assert returned[0] is not None


def test_a_job_that_keeps_its_best_model_returns_that_value(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    returned: list[float | None] = []
    job = sweeps.run_job
    monkeypatch.setattr(sweeps, "run_job", lambda *arguments: returned.append(job(*arguments)))
    assert launch("-m", *SHORT, "checkpoint.best=true", "train.lr=0.5", "evaluate.every=1", "seed=3") == 0
    summary = json.loads((tmp_path / "sweep" / "0" / "summary.json").read_text())
    assert returned == [summary["best"]["value"]]
    assert summary["best"]["value"] < summary["test_loss"]


def test_a_metric_is_refused_in_a_single_run_too(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^optimized_metric: got val_loss without a validation split; set dataset.validation"
    ):
        running.run(compose([*SHORT, "optimized_metric=val_loss"]), tmp_path)
    config = compose([*SHORT, "optimized_metric=loss"])
    with pytest.raises(ConfigError, match=r"^optimized_metric: got 'loss', expected one of .*, test_loss, .*"):
        running.run(config, tmp_path)


@warns
def test_optuna_searches_by_the_loss_and_survives_bad_trials(
    launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="hydra-optuna-sweeper is not installed")
    # One rate is refused, so that its trials fail; one diverges, which is the worst value there is.
    search = ("hparams_search=digits_optuna", *SHORT, "train.lr=-1,1e30,0.001,0.02", "hydra.sweeper.n_trials=8")
    assert launch(*search) == 1
    summaries = [json.loads(file.read_text()) for file in tmp_path.glob("sweep/*/summary.json")]
    assert {each["status"] for each in summaries} == {"completed", "diverged"}
    assert len(summaries) < 8
    best = min((each for each in summaries if each["status"] == "completed"), key=lambda each: each["val_loss"])
    found: Any = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml")
    assert (found.best_params["train.lr"], found.best_value) == (best["lr"], best["val_loss"])
    out, err = capsys.readouterr()
    assert f"launch.py: {8 - len(summaries)} of 8 jobs failed, " in err
    assert f": val_loss {best['val_loss']}\n" in out


@warns
@pytest.mark.parametrize("max_failure_rate", [0.0, 1.0])
def test_a_search_whose_trials_all_fail_ends_without_a_traceback(
    max_failure_rate: float, launch: Launch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="hydra-optuna-sweeper is not installed")
    rate = f"hydra.sweeper.max_failure_rate={max_failure_rate}"
    assert launch("hparams_search=digits_optuna", *SHORT, "train.lr=-1,-2", "hydra.sweeper.n_trials=2", rate) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert ("2 of 2 jobs failed" if max_failure_rate else "1 of 2 jobs failed, 1 not started") in err


@warns
def test_optuna_maximizes_an_accuracy_and_a_diverged_run_is_the_worst(launch: Launch, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="hydra-optuna-sweeper is not installed")
    search = ("hparams_search=digits_optuna", *SHORT, "train.lr=0.001,1e30", "optimized_metric=test_accuracy")
    assert launch(*search, "hydra.sweeper.n_trials=6", "hydra.sweeper.direction=maximize") == 0
    assert set(statuses(tmp_path / "sweep").values()) == {"completed", "diverged"}
    found: Any = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml")
    assert found.best_params["train.lr"] == 0.001


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [DISTANCE, "optimized_metric=test_accuracy"],
            "optimized_metric: got 'test_accuracy', expected one of .*, test_mae, .*",
        ),
        (["optimized_metric=test_mae"], "optimized_metric: got 'test_mae', expected one of .*, test_accuracy, .*"),
        (["optimized_metric=by_name"], "optimized_metric: got 'by_name', expected one of .*"),
    ],
)
def test_the_metrics_of_the_task_can_be_searched_by_and_no_others(
    arguments: list[str], message: str, launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch("-m", *SHORT, "seed=0,1", *arguments) == 2
    assert re.fullmatch(f"launch.py: {message}\n", capsys.readouterr().err)
    assert statuses(tmp_path / "sweep") == {}


@pytest.mark.parametrize(("metric", "best"), [("test_mae", min), ("test_hits", max)])
def test_the_end_names_the_best_job_by_the_direction_of_its_metric(
    metric: str, best: Callable[..., Any], launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch("-m", *SHORT, "train.lr=0.0001,0.02,0.001", DISTANCE, f"optimized_metric={metric}") == 0
    found = [json.loads((tmp_path / "sweep" / str(n) / "summary.json").read_text())[metric] for n in range(3)]
    number = found.index(best(found))
    assert len(set(found)) == 3
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("best: ")]
    settings = f"train.lr={(0.0001, 0.02, 0.001)[number]}"
    assert line == f"best: job {number + 1} of 3 ({settings}): {metric} {found[number]:.6g}; {tmp_path / 'sweep' / str(number)}"


def test_a_metric_that_no_evaluation_has_brought_fails_its_job(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    task = "+task._target_=tests.support.error_task.Open"
    assert launch("-m", *SHORT, "seed=0", task, "optimized_metric=test_odd") == 1
    said = "job 1 of 1 failed: optimized_metric: the run has no test_odd, only test_loss, test_mae, test_hits"
    assert f"launch.py: {said}\n" in capsys.readouterr().err


def test_jobs_are_not_compared_by_what_has_no_direction(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("-m", *SHORT, "seed=0,1", "optimized_metric=delay_max") == 0
    assert "best: " not in capsys.readouterr().out


@warns
def test_a_direction_that_only_a_name_speaks_against_is_a_warning(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="hydra-optuna-sweeper is not installed")
    warned: list[str] = []
    monkeypatch.setattr(logging.getLogger("ormo_rpc.sweeps"), "warning", lambda text, *words: warned.append(text % words))
    search = ("hparams_search=digits_optuna", *SHORT, "task=own_loop", "hydra.sweeper.n_trials=1")
    assert launch(*search, "optimized_metric=test_f1") == 1  # a loop of one's own needs its script
    assert warned == [
        "hydra.sweeper.direction: got minimize, expected maximize with optimized_metric=test_f1, as far as its name tells"
    ]
    assert "task: own_loop is that of a script" in capsys.readouterr().err


def test_metrics_that_come_with_the_first_evaluation_are_looked_for_at_the_end() -> None:
    own = OwnLoopTask()
    refuse_metric("test_anything", own)
    refuse_metric("train_tokens", own)
    refuse_metric("test_anything", None)  # jobs of several tasks
    with pytest.raises(
        ConfigError, match=r"^optimized_metric: got 'anything', expected one of cancelled, delay_99_percent, .*, test_loss, .*"
    ):
        refuse_metric("anything", own)
    with pytest.raises(ConfigError, match=r"^optimized_metric: got val_x without a validation split"):
        refuse_metric("val_x", own, validation=False)
    assert higher_is_better("test_accuracy", own.metric) is True
    assert higher_is_better("val_nll", own.metric) is False
    assert higher_is_better("train_loss", own.metric) is False
    assert [higher_is_better(name, own.metric) for name in ("train_tokens", "delay_max", "test_")] == [None] * 3


@warns
@pytest.mark.parametrize(
    ("metric", "direction", "message"),
    [
        ("test_accuracy", "minimize", "got minimize, expected maximize with optimized_metric=test_accuracy"),
        ("null", "maximize", "got maximize, expected minimize with optimized_metric=null (a loss)"),
        (f"test_mae {DISTANCE}", "maximize", "got maximize, expected minimize with optimized_metric=test_mae"),
        (f"test_hits {DISTANCE}", "minimize", "got minimize, expected maximize with optimized_metric=test_hits"),
        ("null", "[minimize,maximize]", "got ['minimize', 'maximize'], expected minimize or maximize, for one metric"),
    ],
)
def test_a_search_for_the_worst_value_is_refused(
    metric: str, direction: str, message: str, launch: Launch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="hydra-optuna-sweeper is not installed")
    words = f"optimized_metric={metric}".split()
    assert launch("hparams_search=digits_optuna", *SHORT, *words, f"hydra.sweeper.direction={direction}") == 2
    assert capsys.readouterr().err == f"launch.py: hydra.sweeper.direction: {message}\n"
