"""Output that cannot be written: a reader that has gone, a full disk, a closed stream."""

from __future__ import annotations

import io
import logging
import os
import shlex
import subprocess
import sys
import traceback
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TextIO

import pytest

from ormo_rpc import console
from ormo_rpc.loggers.progress import ProgressBar
from ormo_rpc.loggers.statistics import Statistics
from tests.support.processes import PATIENCE_SECONDS, ROOT


def without_reader() -> TextIO:
    """A pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def full() -> TextIO:
    """A disk that is full."""
    return Path("/dev/full").open("w")


def closed() -> TextIO:
    """A stream that is closed."""
    stream = io.StringIO()
    stream.close()
    return stream


def ascii_only() -> TextIO:
    """A stream that lacks most characters."""
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii")


BROKEN = [
    without_reader,
    pytest.param(
        full, marks=pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
    ),
    closed,
    ascii_only,
]


@pytest.fixture(params=BROKEN)
def broken(request: pytest.FixtureRequest) -> Generator[TextIO]:
    """A stream that does not take what is written."""
    make: Callable[[], TextIO] = request.param
    stream = make()
    yield stream
    console.best_effort(stream).close()


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file for what could not be said."""
    monkeypatch.setattr(console, "_unsaid_log", None)
    file = tmp_path / "logs" / "launcher.log"
    console.keep_unsaid(file)
    return file


def kept(log: Path) -> list[str]:
    """The lines of the file, without date and time."""
    return [line.split(" ", 2)[2] for line in log.read_text(encoding="utf-8").splitlines()]


def test_a_line_that_cannot_be_written_is_kept_in_the_log(broken: TextIO, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", broken)
    console.say("launch.py: worker 1 was killed \N{SKULL}")
    console.say("launch.py: restarting it \N{SKULL}")
    console.say("completed: \N{SKULL}\nrun directory: /d")
    print("\r10% \N{SKULL}\r20% \N{SKULL}", end="\n\n", file=console.best_effort(broken))
    said = ["launch.py: worker 1 was killed \N{SKULL}", "launch.py: restarting it \N{SKULL}"]
    assert kept(log) == [*said, "completed: \N{SKULL}", "run directory: /d", "20% \N{SKULL}"]


def test_whatever_writes_to_the_standard_streams_meets_no_fault(
    broken: TextIO, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", broken)
    monkeypatch.setattr(sys, "stderr", broken)
    console.install()
    handler = logging.StreamHandler()
    print("a \N{SKULL}", "b")  # noqa: T201 - by whoever prints
    sys.stdout.writelines(["c \N{SKULL}\n"])
    handler.emit(logging.makeLogRecord({"msg": "d \N{SKULL}"}))
    try:
        raise KeyError("e \N{SKULL}")
    except KeyError:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    found = kept(log)
    assert found[:3] == ["a \N{SKULL} b", "c \N{SKULL}", "d \N{SKULL}"]
    assert found[-1] == "KeyError: 'e \N{SKULL}'"


def test_a_stream_that_works_is_written_at_once_and_keeps_its_properties(log: Path, tmp_path: Path) -> None:
    with (tmp_path / "out").open("w", encoding="latin-1") as file:
        stream = console.best_effort(file)
        print("first", file=stream)
        stream.write("unfinished")
        assert (tmp_path / "out").read_text() == "first\n"
        assert (stream.encoding, stream.fileno(), stream.closed) == ("latin-1", file.fileno(), False)
        assert console.best_effort(stream) is stream
        with pytest.raises(TypeError):
            stream.write(b"bytes")  # pyright: ignore[reportArgumentType] # a fault of the caller's stays one
    assert not log.exists()


@pytest.mark.usefixtures("log")
def test_the_log_of_a_directory_that_is_gone_is_not_made_again(tmp_path: Path) -> None:
    console.keep_unsaid(tmp_path / "gone" / "logs" / "launcher.log")
    print("unsaid", file=console.best_effort(closed()))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("log")
def test_without_standard_streams_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    console.say("a line")
    assert not console.on_terminal()
    console.install()
    console.say("a line")
    assert not console.on_terminal()
    sys.stderr.close()
    sys.stdout.close()
    assert not console.on_terminal()  # closed


@pytest.mark.usefixtures("log")
@pytest.mark.parametrize("make", BROKEN[:2])
def test_a_progress_bar_does_not_care_for_its_terminal(make: Callable[[], TextIO]) -> None:
    terminal = make()
    bar = ProgressBar(10, terminal.fileno())
    bar.log({"iteration": 1, "epoch": 0.1}, Statistics())
    assert bar._bar.n == 1  # pyright: ignore[reportPrivateUsage] # it has no other place to be seen
    bar.finish({})
    terminal.close()


@pytest.mark.slow
@pytest.mark.timeout(2 * PATIENCE_SECONDS)
@pytest.mark.parametrize(
    ("arguments", "redirection", "status"),
    [
        ("launch.py --help", "> /dev/full", 0),
        ("launch.py worker=4", "2> /dev/full", 2),
        ("-m ormo_rpc.evaluate --help", "> /dev/full", 0),
    ],
)
def test_a_command_has_its_exit_status_also_where_nobody_reads(arguments: str, redirection: str, status: int) -> None:
    ended = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{shlex.quote(sys.executable)} {arguments} {redirection}"],  # noqa: S607 - any bash
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (status, "", "")
