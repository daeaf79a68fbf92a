"""Temporary folders that processes leave when they are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ormo_rpc.runtimes.temporary import temporary_folder

HOLD = """
import sys
from ormo_rpc.runtimes.temporary import temporary_folder
with temporary_folder("held") as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


def held(directory: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that holds a folder, which is there."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(directory)},
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_folders_of_dead_processes_are_removed_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (killed, left), (alive, kept) = held(tmp_path), held(tmp_path)
    with killed, alive:
        killed.send_signal(signal.SIGKILL)
        killed.wait(10)
        others = [tmp_path / name for name in ("held_elsewhere_1_x", f"{'_'.join(left.name.split('_')[:2])}_x_y", "held")]
        for folder in others:
            folder.mkdir()
        (left / "inside").write_text("")
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        with temporary_folder("held") as mine:
            assert mine.parent == kept.parent == tmp_path
            assert sorted(tmp_path.iterdir()) == sorted([mine, kept, *others])
        assert not mine.exists()
        alive.communicate(timeout=10)
    assert not kept.exists()
