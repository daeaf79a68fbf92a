"""Paths on the command line: from where the command was started, with ``~``, and with signs that hydra's grammar lacks."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ormo_rpc import cli, evaluate
from ormo_rpc.cli import main
from ormo_rpc.composing import compose
from ormo_rpc.config.parsing import load_config, parse_config
from ormo_rpc.config.paths import located
from ormo_rpc.config.schema import Config
from ormo_rpc.errors import ConfigError
from ormo_rpc.overrides import prepared
from ormo_rpc.report import __main__ as report
from ormo_rpc.runtimes.running import run
from tests.support.keys import KEYS, label

PATHS = [key for key in KEYS if key[3].metadata["path"]]
SIM = ("runtime=sim", "logger=none", "workers=2", "train.max_iterations=4", "checkpoint.every_seconds=0")
QUIET = ("hydra/hydra_logging=none", "hydra/job_logging=none")
PARTS = {"heterogeneity": "recorded", "logger": "wandb"}
"""The part of a group that has a path."""


def with_path(path: str, name: str, value: str) -> Config:
    part = {"name": PARTS[path]} if path in PARTS else {}
    return parse_config({path: {**part, name: value}})


def test_the_options_that_are_paths() -> None:
    keys = {section.key(field.name) for _, _, section, field in PATHS}
    assert keys == {
        "dataset.root",
        "checkpoint.resume",
        "server.secret_file",
        "replay.run",
        "heterogeneity.run",
        "logger.directory",
    }


@pytest.mark.parametrize("key", [key for key in PATHS if key[0] != "dataset" or key[1] == "digits"], ids=label)
def test_a_path_is_meant_from_where_the_command_was_started(key: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _, _, field = key
    (tmp_path / "job").mkdir()
    monkeypatch.chdir(tmp_path / "job")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def read(value: str, start: Path) -> str:
        return getattr(getattr(located(with_path(path, field.name, value), start), path), field.name)

    assert read("runs/one", tmp_path) == str(tmp_path / "runs" / "one")
    assert read("runs/one", tmp_path / "job") == "runs/one"
    assert read("/runs/one", tmp_path) == "/runs/one"
    assert read("~/runs", tmp_path) == str(tmp_path / "home" / "runs")
    with pytest.raises(ConfigError, match=rf"^{path}\.{field.name}: got '~nobody-here/x', whose home directory is not known; "):
        read("~nobody-here/x", tmp_path)
    # Stands for every error but that nothing is there; the rights of a file do not bind the superuser.
    with pytest.raises(ConfigError, match=rf"^{path}\.{field.name}: /x+ cannot be read: File name too long$"):
        read("/" + "x" * 300, tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match=rf"^{path}\.{field.name}: {tmp_path} cannot be read: Permission denied$"):
        read(str(tmp_path), tmp_path)


def test_a_configuration_without_paths_to_change_is_the_same_object() -> None:
    config = Config()
    assert located(config, Path.cwd()) is config


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        *(
            "multirun/2026-01-01/train.lr=0.1,seed=1",
            "runs/lr=0.1",
            "my runs/one",
            "größe/β=0.9",
            "~/runs",
            "a#b;c&d!e",
            "a(1)/b",
        ),
        *("Tom's=runs", "a=b\\", "C:\\runs\\a=1", "a=[1]", "<x>"),
    ],
)
def test_a_path_can_have_any_sign(path: str) -> None:
    if "," not in path:
        assert compose([f"checkpoint.resume={path}"]).checkpoint.resume == path
    quoted = path.replace("'", "\\'").removesuffix("\\") + ("\\\\" if path.endswith("\\") else "")
    assert compose([f"checkpoint.resume='{quoted}'"]).checkpoint.resume == path


def test_a_list_of_paths_in_a_sweep_is_quoted_one_by_one() -> None:
    assert prepared(["checkpoint.resume=runs/lr=0.1,runs/lr=0.2,plain"]) == [
        "checkpoint.resume='runs/lr=0.1','runs/lr=0.2',plain"
    ]


@pytest.mark.parametrize("address", ["[::1]:5", "[fd00::1]:29600", "[fe80::1%eth0]:5", "[::ffff:10.0.0.5]:5"])
@pytest.mark.parametrize("plus", ["", "++"])
def test_an_address_of_ipv6_is_no_list(plus: str, address: str) -> None:
    assert compose([f"{plus}server.address={address}"]).server.address == address
    assert compose([f"server.address='{address}'"]).server.address == address


@pytest.mark.parametrize(
    "word",
    [
        "train.lr=0.1,0.2",
        "train.lr=interval(0.1,1)",
        "train.lr_milestones=[1,2]",
        "dataset.root=${oc.env:HOME}",
        "~logger",
        "seed=",
        "server.address=10.0.0.5:29600",
        "server.address=:29600",
    ],
)
def test_what_hydra_can_read_stays_as_it_is(word: str) -> None:
    assert prepared([word]) == [word]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.lr==0.1", r"train\.lr: got '=0\.1', expected a finite number > 0"),
        ("train.lr_milestones=[1,2", r".*no viable alternative.*|.*mismatched.*|.*extraneous.*|.*expecting.*"),
    ],
)
def test_what_is_no_path_is_refused_as_before(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        compose([word])


def launch(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setenv(cli.FULL_ERROR, "")  # so that its absence is restored
    monkeypatch.delenv(cli.FULL_ERROR)
    monkeypatch.setattr(sys, "argv", ["launch.py", *SIM, *QUIET, *arguments])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize("command", [evaluate, report])
def test_the_other_commands_know_the_home_directory(
    command: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [command.__name__, "~/runs/one"])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert f"{tmp_path}/runs/one: got a " in capsys.readouterr().err


@pytest.mark.slow
def test_a_job_that_changes_its_directory_finds_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert launch(monkeypatch, "hydra.run.dir=runs/seed=0") == 0
    change = ("hydra.job.chdir=true", "dataset.root=some data")
    more = (
        "train.max_iterations=6",
        "checkpoint.resume=runs/seed=0",
        "heterogeneity=recorded",
        "heterogeneity.run=runs/seed=0",
    )
    assert launch(monkeypatch, *change, *more, "hydra.run.dir=~/größer/two") == 0
    two = tmp_path / "größer" / "two"
    assert json.loads((two / "summary.json").read_text())["iterations"] == 6
    config = load_config(two / "config.yaml")
    assert config.checkpoint.resume == str(tmp_path / "runs" / "seed=0")
    assert config.dataset.root == str(tmp_path / "some data")
    # Relative to the directory of the command, the sweep's jobs being in others.
    assert (
        launch(monkeypatch, *change, "-m", "hydra.sweep.dir=sweep", "runtime=replay", "replay.run=runs/seed=0", "seed=0,1") == 0
    )
    assert {file.parent.name for file in tmp_path.glob("sweep/*/summary.json")} == {"0", "1"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checkpoint.resume=runs/lr=1"], "runs/lr=1: got a path without an intact checkpoint, expected "),
        (["checkpoint.resume=/dev/null"], "/dev/null: got a path without an intact checkpoint, expected "),
        (["runtime=replay", "replay.run=nowhere"], "replay.run: got nowhere, expected the directory of a run that has ended"),
        (["heterogeneity=recorded", "heterogeneity.run=no where"], "heterogeneity.run: got 'no where', expected "),
        (["dataset=mnist", "dataset.root=/dev/null"], "dataset.root: MNIST is not in /dev/null/MNIST/raw: "),
        (["runtime=rpc", "server.secret_file=~/no=where"], "/no=where: "),
        (["hydra.run.dir=/dev/null/run"], "the run directory cannot be made: Not a directory: /dev/null/run"),
    ],
    ids=lambda value: value[-1].partition("=")[0] if isinstance(value, list) else "",
)
def test_a_folder_that_is_not_there_is_refused_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert launch(monkeypatch, f"hydra.run.dir={tmp_path / 'run'}", *arguments) == 2
    out, err = capsys.readouterr()
    assert (err.count("\n"), out) == (1, "")
    assert message in err, err


def test_a_current_directory_that_was_deleted_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert launch(monkeypatch, f"hydra.run.dir={tmp_path / 'run'}") == 2
    expected = "the run directory cannot be made: No such file or directory: the current directory\n"
    assert capsys.readouterr().err.endswith(expected)


def test_from_python_the_home_directory_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = dataclasses.replace(compose(SIM), replay=dataclasses.replace(Config().replay, run="~/one"))
    summary = run(config, tmp_path / "run")
    assert summary["status"] == "completed"
    assert load_config(tmp_path / "run" / "config.yaml").replay.run == str(tmp_path / "one")


def test_a_module_refuses_the_home_directory_of_nobody(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate", "~nobody-here/x"])
    with pytest.raises(SystemExit, match=r"^2$"):
        evaluate.main()
    refusal = "PATH: got '~nobody-here/x', whose home directory is not known; write the whole path"
    assert capsys.readouterr().err.endswith(f"error: argument path: {refusal}\n")
