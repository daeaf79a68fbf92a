"""The programs in ``examples/`` run, and print what they are meant to show."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def output_of(example: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that a program prints, which is run as from a shell but in this process."""
    monkeypatch.syspath_prepend(str(EXAMPLES))  # as python itself does for the program that it is given
    runpy.run_path(str(EXAMPLES / example), run_name="__main__")
    return [line for line in capsys.readouterr().out.splitlines() if line]


def test_a_server_and_two_workers_in_one_process_reach_the_target(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    *rows, last = output_of("in_process.py", monkeypatch, capsys)
    distances = [float(row.rpartition(" ")[2]) for row in rows]
    assert len(distances) == 6
    assert distances[0] > 0.1
    assert distances[-1] < 0.001
    # 60 gradients; worker 0 makes three in the time in which worker 1 makes one.
    assert last == "completed: worker 0 computed 45 gradients, worker 1 15"
