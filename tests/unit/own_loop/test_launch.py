"""``ormo-rpc launch`` from what was typed to the exit status, without processes."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

from ormo_rpc import launch
from ormo_rpc.composing import compose
from ormo_rpc.config.runtimes import StartKind
from ormo_rpc.config.schema import Config
from ormo_rpc.errors import ConfigError, RunFailed, RunInterrupted
from ormo_rpc.own_loop.command import Command
from ormo_rpc.own_loop.script import Script
from ormo_rpc.runtimes.distributed.launcher import run as launcher_run
from ormo_rpc.runtimes.distributed.launcher.process_monitor import ProcessSlot, if_killed
from ormo_rpc.runtimes.distributed.preloading.preloading import Preloading
from ormo_rpc.storage.launch import Launch

SCRIPT = Script(name="train.py", arguments=("--width", "4"))


class Loads(Preloading):
    """Has a script's configuration, or its end, instead of running it."""

    def __init__(self, result: Config | BaseException) -> None:
        super().__init__(SCRIPT.programs)
        self.result = result
        self.asked: list[tuple[int, StartKind]] = []

    @override
    def load_what(self, request: Mapping[str, Any], what: str, *, threads: int, start: StartKind) -> Config:
        assert (request, what) == ({"script": SCRIPT.text}, "train.py")
        self.asked.append((threads, start))
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Outputs go to a folder of this test's own, and lines have the name of this command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ormo_rpc.console._command", "ormo-rpc launch")
    return tmp_path


def typed(result: Config | BaseException, *overrides: str, run_dir: str | None = None) -> int:
    """Run the command; return its exit status."""
    with Loads(result) as loads:
        return launch.main(Command(script=SCRIPT, overrides=overrides, run_dir=run_dir), loads)


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("model=cnn", "model=cnn: the script has its own model; leave it out"),
        ("dataset.validation=0.1", "dataset.validation=0.1: the script has its own dataset; leave it out"),
        ("seed=1,2", "seed=1,2: got several values, expected one: there are no sweeps of own loops"),
        ("runtime=sim", "runtime: got sim for an own loop, expected rpc"),
        ("trian.lr=1", "trian: got an unknown key; did you mean train?"),
        ("train.lr=-1", "train.lr: got -1.0, expected a finite number > 0"),
    ],
)
def test_wrong_words_are_refused_before_the_script_is_run(
    word: str, line: str, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    assert typed(AssertionError("it was run"), word) == 2
    assert capsys.readouterr().err == f"ormo-rpc launch: {line}\n"
    assert list(here.iterdir()) == []


def test_a_key_of_a_part_that_the_script_may_choose_is_left_to_join() -> None:
    assert typed(ConfigError("join says no"), "compression.ratio=0.5") == 2
    assert typed(SystemExit(0), "compression.ratio=0.5") == 0


def test_a_directory_that_has_a_run_is_refused_before_the_script_is_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "old").mkdir()
    (here / "old" / "trace.jsonl").touch()
    assert typed(AssertionError("it was run"), run_dir="old") == 2
    assert capsys.readouterr().err == (
        f"ormo-rpc launch: {here}/old: got the directory of an earlier run, expected a new one; continue that run with "
        f"checkpoint.resume={here}/old\n"
    )


@pytest.mark.parametrize(
    ("end", "status", "line"),
    [
        (SystemExit(0), 0, ""),
        (SystemExit(5), 5, "train.py has ended itself with status 5 before ormo_rpc.join"),
        (ConfigError("train.py:3: ValueError: no"), 2, "train.py:3: ValueError: no"),
        (RunFailed("the process was lost"), 1, "the process was lost"),
        (RunInterrupted(15), 143, "interrupted by SIGTERM"),
        (KeyboardInterrupt(), 130, "interrupted by SIGINT; there is nothing to resume"),
    ],
)
def test_the_end_of_a_script_before_its_run_is_the_end_of_the_command(
    end: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(end) == status
    assert capsys.readouterr().err == (f"ormo-rpc launch: {line}\n" if line else "")


def test_what_is_logged_about_a_script_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    class Warns(Loads):
        """Warns while it loads."""

        @override
        def load_what(self, request: Mapping[str, Any], what: str, *, threads: int, start: StartKind) -> Config:
            logging.getLogger("ormo_rpc.models").warning("the model has %d views", 2)
            return super().load_what(request, what, threads=threads, start=start)

    with Warns(SystemExit(0)) as loads:
        launch.main(Command(script=SCRIPT), loads)
    logging.getLogger("ormo_rpc.models").warning("later")
    assert capsys.readouterr().err == "ormo-rpc launch: the model has 2 views\n"


def test_a_script_is_run_with_the_threads_and_the_start_that_were_typed() -> None:
    with Loads(SystemExit(0)) as loads:
        launch.main(Command(script=SCRIPT, overrides=("runtime.threads=2", "runtime.start=spawn")), loads)
        assert loads.asked == [(2, StartKind.spawn)]


def test_a_failure_behind_the_loop_of_the_server_is_told_and_the_run_directory_has_what_was_typed(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def supervised(*_: object) -> RunFailed:
        (here / "run" / "summary.json").write_text(json.dumps({"status": "completed", "wall_seconds": 1.0}))
        return RunFailed("the server's end")

    @contextlib.contextmanager
    def no_processes(*_: object) -> Generator[ProcessSlot]:
        yield ProcessSlot("server", None, lambda _: None, if_killed, True, exit_reason="train.py:9: KeyError: 'x'")  # pyright: ignore[reportArgumentType] # it is not started

    monkeypatch.setattr(launcher_run, "local_processes", no_processes)
    monkeypatch.setattr(launcher_run, "_supervise_server", supervised)
    assert typed(compose(["workers=2"]), "seed=1", run_dir="run") == 1
    assert capsys.readouterr().err == "ormo-rpc launch: train.py:9: KeyError: 'x'; before that the run completed\n"
    assert Launch.read(here / "run") == Launch(overrides=["seed=1"], script="train.py", arguments=["--width", "4"])
