"""The command ``launch.py`` itself, as a process: exit status, output, and that a wrong one starts nothing."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path

import pytest

from ormo_rpc.config.help import help_text
from tests.support.processes import PATIENCE_SECONDS, launched

COMMANDS = {
    "unknown key": ["train.lerning=3"],
    "wrong value": ["train.lr_schedule=fast"],
    "out of range": ["train.lr=-1"],
    "unknown name": ["algorithm=adam"],
    "missing data": ["dataset=mnist", "dataset.root=no_such_folder"],
    "help": ["--help"],
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str, Path]]:
    """Exit status, output, errors and run directory of each command; all run at the same time."""
    with ExitStack() as stack:
        started = {
            name: (stack.enter_context(launched("launch.py", f"hydra.run.dir={folder}", *arguments)), folder)
            for name, arguments in COMMANDS.items()
            for folder in [tmp_path_factory.mktemp("launch") / "run"]
        }
        outputs = {name: process.communicate(timeout=PATIENCE_SECONDS) for name, (process, _) in started.items()}
        return {name: (process.returncode, *outputs[name], folder) for name, (process, folder) in started.items()}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unknown key", r"train\.lerning: got an unknown key, expected one of epochs, .*"),
        ("wrong value", r"train\.lr_schedule: got 'fast', expected one of constant, step, cosine"),
        ("out of range", r"train\.lr: got -1\.0, expected a finite number > 0"),
        ("unknown name", r"algorithm: got 'adam', expected one of asgd, .*"),
        ("missing data", r"dataset\.root: MNIST is not in \S+no_such_folder/MNIST/raw: \S+ is missing; .*"),
    ],
)
def test_a_wrong_command_is_refused_in_one_line_and_starts_nothing(
    name: str, message: str, ended: dict[str, tuple[int, str, str, Path]]
) -> None:
    status, out, err, run_dir = ended[name]
    assert re.fullmatch(rf"launch\.py: {message}\n", err), err
    assert (status, out) == (2, "")
    # Hydra's own record at most: config.yaml and logs/ would come before the first process.
    assert {path.name for path in run_dir.glob("*")} <= {".hydra"}


def test_the_command_prints_the_help(ended: dict[str, tuple[int, str, str, Path]]) -> None:
    status, out, err, run_dir = ended["help"]
    assert (status, err) == (0, "")
    assert out == help_text() + "\n"
    assert not run_dir.exists()
