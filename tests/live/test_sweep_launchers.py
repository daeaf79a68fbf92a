"""Sweeps whose jobs run in other processes: what became of each is known at the end as it is for hydra's own launcher."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from ormo_rpc.runtimes.linux import LINUX
from ormo_rpc.storage.summary import read_summary
from ormo_rpc.storage.sweep_directory import SweepDirectory
from tests.support.processes import PATIENCE_SECONDS, descendants, launched, wait_until

pytestmark = [pytest.mark.live, pytest.mark.timeout(180)]  # each starts up to six processes that import PyTorch

LIVE = ("logger=none", "workers=1", "train.max_iterations=20")
SIMULATED = ("runtime=sim", "logger=none", "workers=2", "train.epochs=1", "checkpoint.every_seconds=0")
PLUGINS = {"parallel": "hydra_joblib_launcher", "local": "hydra_submitit_launcher"}


def sweep(folder: Path, launcher: str, *arguments: str) -> tuple[str, ...]:
    """The command of a sweep; the test is skipped where the launcher is not installed."""
    pytest.importorskip(f"hydra_plugins.{PLUGINS[launcher]}", reason=f"{PLUGINS[launcher]} is not installed")
    return ("launch.py", "-m", f"hydra/launcher={launcher}", f"hydra.sweep.dir={folder}", *arguments)


@pytest.mark.parametrize("launcher", PLUGINS)
def test_a_bad_job_does_not_end_the_others_in_other_processes(launcher: str, tmp_path: Path) -> None:
    with launched(*sweep(tmp_path, launcher, *LIVE, "algorithm=asgd,rennala,ormo", "scheduler=sync")) as process:
        _, err = process.communicate(timeout=2 * PATIENCE_SECONDS)
    assert process.returncode == 1
    records = SweepDirectory(tmp_path).records()
    assert [(record.settings, record.status) for record in records] == [
        ("algorithm=asgd", "completed"),
        ("algorithm=rennala", "failed"),
        ("algorithm=ormo", "completed"),
    ]
    for job in "02":  # each process of jobs has its own preloader
        assert (read_summary(tmp_path / job) or {})["start"] == ("fork" if LINUX else "spawn")
    total, named = err.splitlines()[-2:]
    assert total == "launch.py: 1 of 3 jobs failed, 2 completed"
    assert named.startswith(
        "launch.py: job 2 of 3 (algorithm=rennala): scheduler: got 'sync', which rennala does not run under"
    )
    assert named.endswith(f"; {tmp_path / '1'}")


@pytest.mark.parametrize(("launcher", "by_terminal"), [("parallel", True), ("local", False)])
def test_a_signal_ends_a_sweep_and_its_processes(launcher: str, by_terminal: bool, tmp_path: Path) -> None:
    seeds = "seed=0,1,2" if launcher == "parallel" else "seed=0,1"
    with launched(*sweep(tmp_path, launcher, *SIMULATED, "train.epochs=100000", seeds)) as process:
        wait_until(lambda: len(list(tmp_path.glob("*/trace.jsonl"))) == 2, "two jobs have begun")
        family = descendants(process.pid)
        if by_terminal:  # which sends Ctrl-C to all of them
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGTERM)
        try:
            _, err = process.communicate(timeout=PATIENCE_SECONDS)
            wait_until(lambda: not any(map(_runs, family)), "all processes have ended")
        finally:
            for member in filter(_runs, family):
                member.kill()
    assert process.returncode == (130 if by_terminal else 143)
    ended, counted = [line for line in err.splitlines() if line.startswith("launch.py: ")]
    assert ended == "launch.py: the sweep was interrupted"
    expected = "3 jobs, 2 interrupted, 1 not started" if launcher == "parallel" else "2 jobs, 2 interrupted"
    assert counted == f"launch.py: {expected}"


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
