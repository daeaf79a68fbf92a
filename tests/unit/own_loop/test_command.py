"""The command line of ``ormo-rpc launch``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ormo_rpc.errors import ConfigError
from ormo_rpc.own_loop.command import USAGE, Command, parse
from ormo_rpc.own_loop.script import Script


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with scripts, and a module path of this test's own."""
    (tmp_path / "train.py").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__main__.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    return tmp_path


def test_what_stands_behind_the_script_is_its_own() -> None:
    words = ["--workers", "3", "algorithm=ormo_da", "--run-dir=out", "+model.width=4", "train.py", "--workers", "9", "seed=1"]
    script = Script(name="train.py", arguments=("--workers", "9", "seed=1"))
    assert parse(words) == Command(script=script, overrides=("workers=3", "algorithm=ormo_da", "+model.width=4"), run_dir="out")


def test_a_module_and_a_folder_are_run_as_python_runs_them() -> None:
    assert parse(["hydra.run.dir=out", "-m", "package.part", "-v"]) == Command(
        script=Script(name="package.part", module=True, arguments=("-v",)), run_dir="out"
    )
    assert parse(["package"]).script == Script(name="package")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], f"launch: got no script, expected {USAGE}"),
        (["train.lr=1"], f"launch: got no script, expected {USAGE}"),
        (["--wrokers", "2", "train.py"], f"--wrokers: got an unknown option, expected {USAGE}"),
        (["--workers", "train.py"], "--workers: got train.py, expected a whole number >= 1"),
        (["--workers=0", "train.py"], "--workers: got 0, expected a whole number >= 1"),
        (["--run-dir="], "--run-dir: got nothing, expected a folder"),
        (["missing.py"], "missing.py: there is no such file, expected a script, or KEY=VALUE"),
        (["folder"], "folder: got a folder without __main__.py, expected a script"),
        (["-m", "nowhere.train"], "-m nowhere.train: there is no such module, expected one on the module path"),
        (
            ["-m", "seed=1,2", "train.py"],
            "-m: got a sweep, expected a single run: start one after the other; -m MODULE runs a module",
        ),
        (["hydra.sweep.dir=x", "train.py"], "hydra.sweep.dir=x: got an option of hydra's, expected none but hydra.run.dir=DIR"),
    ],
)
def test_wrong_words_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(words)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("words", "threads"), [([], 1), (["runtime.threads=2", "runtime.threads=3"], 3), (["runtime.threads=no"], 1)]
)
def test_the_threads_of_the_first_process_are_those_that_were_typed(words: list[str], threads: int) -> None:
    assert parse([*words, "train.py"]).threads == threads


def test_the_module_path_is_that_of_the_script(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    Script(name=f"{here}/train.py").set_module_path()
    assert sys.path[0] == str(here)
    Script(name=str(here / "package")).set_module_path()
    assert sys.path[0] == str(here / "package")
    Script(name="package", module=True).set_module_path()
    assert sys.path[0] == "/"


def test_the_package_stays_on_the_module_path(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``python -m ormo_rpc`` may be typed in the checkout of a package that is installed nowhere."""
    monkeypatch.setattr(sys, "path", [""])
    Script(name="train.py").set_module_path()
    root = str(Path(__file__).resolve().parents[3])
    assert sys.path == [str(here), root]
