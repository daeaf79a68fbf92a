"""The jobs of a sweep: a bad one does not end the others, and the end names it; what is refused before any starts."""

from __future__ import annotations

import math
import signal
import sys
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.config_store import ConfigStore
from torch import nn

from ormo_rpc.composing import compose
from ormo_rpc.config.schema import Config
from ormo_rpc.config.write_conf import conf_dir
from ormo_rpc.errors import RunFailed, RunInterrupted
from ormo_rpc.runtimes import running
from tests.support.sweeps import SHORT, Launch, statuses

pytestmark = pytest.mark.slow  # hydra takes most of a second for each sweep


def linear(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A model."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), num_classes))


def ends_the_process() -> nn.Module:
    """Exit the process instead of returning a model."""
    sys.exit(7)


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


def test_jobs_of_slurm_are_refused_where_it_is_not_installed(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="hydra's launchers of submitit are not installed")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch("-m", *SHORT, "seed=0,1", "hydra/launcher=slurm") == 2
    said = "launch.py: hydra/launcher=slurm: got a machine without the program srun, expected one from which jobs of Slurm are "
    out, err = capsys.readouterr()
    assert (err.startswith(said), err.count("\n"), out) == (True, 1, "")
    assert statuses(tmp_path / "sweep") == {}


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
