"""The command ``launch.py`` itself, as a process: exit status, output, and that a wrong one starts nothing."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import ormo_rpc
from ormo_rpc.cli import main
from ormo_rpc.config.help import help_text
from tests.support.processes import ROOT, launch

pytestmark = pytest.mark.slow


# One that composing refuses, as test_refusals.py has many; and those that data, a module or the trial batch refuses.
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.lerning=3"], r"train\.lerning: got an unknown key, expected one of epochs, .*"),
        (
            ["dataset=mnist", "dataset.root=no_such_folder"],
            r"dataset\.root: MNIST is not in \S+no_such_folder/MNIST/raw: \S+ is missing; .*",
        ),
        (
            ["model._target_=broken.Net"],
            r"model\._target_: 'broken\.Net' cannot be imported: \S+/broken\.py:2: SyntaxError: invalid syntax",
        ),
        (
            ["model._target_=tests.support.untrainable.dense"],
            r"model: \S+\.dense on training batch 0 of digits: the output \(32, 3, 8, 8\) does not fit targets \(32,\): .*",
        ),
    ],
    ids=["unknown key", "missing data", "module of the user's", "output that does not fit"],
)
def test_a_wrong_command_is_refused_in_one_line_and_starts_nothing(arguments: list[str], message: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    (tmp_path / "broken.py").write_text("import torch\nclass Net(:\n")
    status, out, err = launch(run_dir, *arguments, env={"PYTHONPATH": f"{ROOT}:{tmp_path}"})
    assert re.fullmatch(rf"launch\.py: {message}\n", err), err
    assert (status, out) == (2, "")
    # Hydra's own record at most: config.yaml and logs/ would come before the first process.
    assert {path.name for path in run_dir.glob("*")} <= {".hydra"}


def test_the_command_prints_the_help(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    status, out, err = launch(run_dir, "--help")
    assert (status, err) == (0, "")
    assert out == help_text() + "\n"
    assert not run_dir.exists()


def test_the_command_prints_its_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["launch.py", "--version"])
    main()
    assert capsys.readouterr().out.startswith(f"ormo_rpc {ormo_rpc.__version__}, hydra ")
