"""The command of a sweep."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from ormo_rpc import cli
from ormo_rpc.cli import main
from tests.support.sweeps import SILENT, Launch


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
