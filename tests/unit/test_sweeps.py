"""Sweeps in this process: a bad job does not end the others, the end names it, and a search gets its metric."""

from __future__ import annotations

import json
import logging
import math
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import TensorDataset

from ormo_rpc import cli, sweeps
from ormo_rpc.cli import main
from ormo_rpc.composing import compose
from ormo_rpc.config.schema import Config
from ormo_rpc.config.write_conf import conf_dir
from ormo_rpc.errors import ConfigError, RunFailed, RunInterrupted
from ormo_rpc.runtimes import running
from ormo_rpc.storage.optimized_metric import higher_is_better, refuse_metric
from ormo_rpc.tasks.own_loop import OwnLoopTask

SHORT = ("runtime=sim", "logger=none", "workers=2", "train.epochs=1", "checkpoint.every_seconds=0")
SILENT = ("hydra/hydra_logging=none", "hydra/job_logging=none")

pytestmark = pytest.mark.slow  # hydra takes most of a second for each sweep

Launch = Callable[..., int]


def linear(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A model."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), num_classes))


def with_validation() -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """A data set with a validation split of its own."""
    data = TensorDataset(torch.randn(80, 3, generator=torch.Generator().manual_seed(0)), torch.arange(80) % 2)
    return data, data, TensorDataset(*data[:20])


def ends_the_process() -> nn.Module:
    """No model, and no exception that can be expected."""
    sys.exit(7)


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Launch:
    """Run ``launch.py`` with these arguments in this process; the exit status."""

    def launch(*arguments: str) -> int:
        monkeypatch.setenv(cli.FULL_ERROR, "")  # so that its absence is restored
        monkeypatch.delenv(cli.FULL_ERROR)
        monkeypatch.setattr(logging, "raiseExceptions", False)  # optuna logs to the standard error of the first test
        monkeypatch.setattr(sys, "argv", ["launch.py", f"hydra.sweep.dir={tmp_path / 'sweep'}", *SILENT, *arguments])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return launch


def statuses(sweep: Path) -> dict[str, str]:
    """The status of each run by the name of its folder."""
    return {file.parent.name: json.loads(file.read_text())["status"] for file in sorted(sweep.glob("*/summary.json"))}


@pytest.mark.parametrize(
    ("swept", "bad", "reason"),
    [
        (["algorithm=asgd,rennala,ormo", "scheduler=sync"], "algorithm=rennala", "scheduler: got 'sync', which rennala "),
        (["train.lr=0.01,-1,0.02"], "train.lr=-1", "train.lr: got -1.0, expected a finite number > 0"),
        (
            [f"model._target_={__name__}.linear,{__name__}.ends_the_process,{__name__}.linear"],
            f"model._target_={__name__}.ends_the_process",
            f"model: {__name__}.ends_the_process cannot be made: SystemExit: 7",
        ),
    ],
    ids=["rennala under sync", "learning rate", "model"],
)
def test_a_bad_job_does_not_end_the_others(
    swept: list[str], bad: str, reason: str, launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch("-m", *SHORT, *swept) == 1
    assert statuses(tmp_path / "sweep") == {"0": "completed", "2": "completed"}
    out, err = capsys.readouterr()
    first, total, named = err.splitlines()
    assert first.startswith(f"launch.py: job 2 of 3 failed: {reason}")
    assert total == "launch.py: 1 of 3 jobs failed, 2 completed"
    assert named.startswith(f"launch.py: job 2 of 3 ({bad}): {reason}")
    assert named.endswith(f"; {tmp_path / 'sweep' / '1'}")
    assert [line for line in out.splitlines() if line.startswith("job ")][1] == f"job 2 of 3: {bad}"
    assert out.splitlines()[-1] == f"compare its runs: python -m ormo_rpc.report {tmp_path / 'sweep'}"


def test_two_jobs_of_one_directory(launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("-m", *SHORT, "hydra.sweep.subdir=same", "seed=0,1") == 1
    assert statuses(tmp_path / "sweep") == {"same": "completed"}
    assert "job 2 of 2 (seed=1): " + str(tmp_path / "sweep" / "same") in capsys.readouterr().err


def test_a_diverged_job_is_a_result(launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("-m", *SHORT, "train.lr=0.01,1e30") == 0
    assert statuses(tmp_path / "sweep") == {"0": "completed", "1": "diverged"}
    assert capsys.readouterr().err == "launch.py: 2 jobs, 1 completed, 1 diverged\n"


def test_a_run_that_fails_and_an_error_of_the_program_are_told(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: Config, *_: Any, **__: Any) -> dict[str, Any]:
        if config.seed == 0:
            raise RunFailed("server: killed by SIGKILL")
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(running, "run", run)
    assert launch("-m", *SHORT, "seed=0,1") == 1
    err = capsys.readouterr().err
    assert "launch.py: 2 of 2 jobs failed\n" in err
    assert "job 1 of 2 (seed=0): server: killed by SIGKILL; " in err
    assert "job 2 of 2 (seed=1): ZeroDivisionError: a fault; " in err


def test_an_interruption_ends_a_sweep(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds: list[int] = []

    def run(config: Config, *_: Any, **__: Any) -> dict[str, Any]:
        seeds.append(config.seed)
        raise RunInterrupted(signal.SIGTERM)

    monkeypatch.setattr(running, "run", run)
    assert launch("-m", *SHORT, "seed=0,1,2") == 128 + signal.SIGTERM
    assert seeds == [0]
    assert capsys.readouterr().err.splitlines() == [
        "launch.py: the sweep was interrupted",
        "launch.py: 3 jobs, 1 interrupted, 2 not started",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["algorithm=asgd,asgdd"], "algorithm: got 'asgdd', expected one of adamw, "),
        (["seed=0,1", "train.lerning=3"], "train.lerning: got an unknown key"),
        (["seed=0,1", "model._target_=no_such_module.net"], "model._target_: 'no_such_module.net' cannot be imported: "),
        (["seed=0,1", "optimized_metric=loss"], "optimized_metric: got 'loss', expected one of cancelled, delay_99_percent, "),
        (["seed=0,1", "hydra.sweep.dir=/dev/null/sweep"], "hydra.sweep.dir: /dev/null/sweep cannot be made: Not a directory"),
    ],
    ids=["name", "key", "target", "metric", "directory"],
)
def test_a_sweep_is_refused_before_anything_starts(
    arguments: list[str], message: str, launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch("-m", *SHORT, *arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"launch.py: {message}"), err
    assert err.count("\n") == 1
    assert out == ""
    assert statuses(tmp_path / "sweep") == {}


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


@pytest.mark.parametrize(
    ("override", "group", "name"),
    [
        ("hparams_search=digits_optuna", "hydra/sweeper", "optuna"),
        ("hydra/launcher=parallel", "hydra/launcher", "joblib"),
        ("hydra/launcher=slurm", "hydra/launcher", "submitit_slurm"),
    ],
)
def test_a_missing_plugin_is_named_with_the_way_to_install_it(
    override: str, group: str, name: str, launch: Launch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compose()  # which registers the plugins that are installed
    entries = ConfigStore.instance().repo["hydra"][group.partition("/")[2]]
    monkeypatch.delitem(entries, f"{name}.yaml", raising=False)
    assert launch("-m", *SHORT, override, "train.lr=0.1") == 2
    message = f"{group}={name}: needs a plugin of hydra that is not installed; pip install 'ormo-rpc[sweeps]'"
    assert capsys.readouterr().err == f"launch.py: {message}\n"


@pytest.mark.parametrize(
    ("launcher", "package", "target", "values"),
    [
        ("parallel", "hydra_joblib_launcher", "joblib_launcher.JoblibLauncher", {"n_jobs": 2}),
        ("local", "hydra_submitit_launcher", "submitit_launcher.LocalLauncher", {"timeout_min": 60}),
        ("slurm", "hydra_submitit_launcher", "submitit_launcher.SlurmLauncher", {"tasks_per_node": 1, "partition": "gpu"}),
    ],
)
def test_a_launcher_has_the_options_of_its_plugin(launcher: str, package: str, target: str, values: dict[str, Any]) -> None:
    pytest.importorskip(f"hydra_plugins.{package}", reason=f"{package} is not installed")
    partition = ["hydra.launcher.partition=gpu"] * (launcher == "slurm")
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        composed = hydra.compose("config", [f"hydra/launcher={launcher}", *partition], return_hydra_config=True)
    assert composed.hydra.launcher._target_ == f"hydra_plugins.{package}.{target}"
    assert {key: composed.hydra.launcher[key] for key in values} == values


# ---------------------------------------------------------------------------------------------------------------- optuna

warns = pytest.mark.filterwarnings("ignore")  # optuna and sqlalchemy, of themselves


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


DISTANCE = "+task._target_=tests.support.error_task.Distance"


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


@pytest.mark.parametrize(
    ("words", "variable", "message"),
    [
        (["logger.run_id=abc"], "", "logger.run_id: got abc"),
        ([], "abc", "WANDB_RUN_ID: got abc"),
    ],
)
def test_one_wandb_id_for_all_jobs_is_refused(
    words: list[str],
    variable: str,
    message: str,
    launch: Launch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The curves of all jobs would become those of one run."""
    monkeypatch.setenv("WANDB_RUN_ID", variable)
    assert launch("-m", *SHORT, "logger=wandb", "seed=0,1", *words) == 2
    assert capsys.readouterr().err == f"launch.py: {message} for all jobs of a sweep, expected an id for each; leave it out\n"
    assert not list(tmp_path.rglob("summary.json"))
