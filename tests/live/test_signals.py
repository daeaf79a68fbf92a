"""Signals as managers send them: to all processes of a run at one moment, more than once, or to one that is no launcher."""

from __future__ import annotations

import random
import re
import signal
from pathlib import Path

import psutil
import pytest

from tests.support.processes import CALM, QUIET, descendants, events, gone, launch, launched, processes, summary, wait_until

pytestmark = [pytest.mark.live, pytest.mark.timeout(180)]

LONG = (*QUIET, *CALM, "workers=2", "train.epochs=100000")


def everybody(launcher: int) -> list[psutil.Process]:
    """A launcher and all that it has started, in the order in which a manager happens to find them."""
    found = [psutil.Process(launcher), *descendants(launcher)]
    random.shuffle(found)
    return found


def send(found: list[psutil.Process], number: signal.Signals) -> None:
    """Send each of them a signal."""
    for process in found:
        process.send_signal(number)


def test_signals_to_all_processes_leave_checkpoints_from_which_nothing_is_lost(tmp_path: Path) -> None:
    """SIGUSR1, as Slurm sends before its time limit; then SIGTERM, the way systemd ends a unit, with SIGHUP after it."""
    first, second = tmp_path / "first", tmp_path / "second"
    with launched("launch.py", f"hydra.run.dir={first}", *LONG, "checkpoint.every_seconds=0") as launcher:
        processes(first)
        family = everybody(launcher.pid)
        assert len(family) >= 4
        send(family, signal.SIGUSR1)
        assert wait_until(lambda: list(first.glob("checkpoints/iteration_*")), "the checkpoint that was asked for")
        seen = len(events(first, "apply"))
        wait_until(lambda: len(events(first, "apply")) > seen + 20, "further updates")
        assert not gone([psutil.Process(pid) for pid in (launcher.pid, *map(int, workers_of(first)))])
        send(family, signal.SIGTERM)
        for process in family:  # some have ended
            if process.is_running():
                process.send_signal(signal.SIGHUP)
        _, err = launcher.communicate(timeout=30)
        assert launcher.returncode in (128 + signal.SIGTERM, 128 + signal.SIGHUP, -signal.SIGHUP)
        wait_until(lambda: gone(family), "the end of all of them")
    lines = [line for line in err.splitlines() if " left the run on SIG" not in line]
    assert re.fullmatch(rf"launch\.py: server: wrote the checkpoint that was asked for: {first}/checkpoints/\w+", lines[0])
    assert re.fullmatch(
        rf"launch\.py: interrupted by SIG(TERM|HUP); iteration \d+ is kept: resume with checkpoint\.resume={first}", lines[-1]
    )
    assert "restart" not in err
    kept = summary(first)
    assert (kept["status"], kept["reason"] in ("SIGTERM", "SIGHUP")) == ("interrupted", True)
    assert kept["iterations"] == len(events(first, "apply")), "every applied gradient is in the checkpoint"
    more = kept["iterations"] + 30
    status, _, err = launch(second, *LONG, f"checkpoint.resume={first}", f"train.max_iterations={more}")
    assert status == 0, err
    applied = [event for run in (first, second) for event in events(run, "apply")]
    assert [event["iteration"] for event in applied] == list(range(more))
    assert sorted(event["ticket"] for event in applied) == list(range(more))


def workers_of(run_dir: Path) -> list[int]:
    """The process ids of the workers."""
    return list(processes(run_dir)["workers"].values())


def test_an_ignored_hangup_harms_nobody_and_of_sigterm_a_worker_leaves_and_a_server_ends_the_run(tmp_path: Path) -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with launched("launch.py", f"hydra.run.dir={tmp_path}", *LONG) as launcher:
            server = processes(tmp_path)["server"]
            family = everybody(launcher.pid)
            send(family, signal.SIGHUP)
            seen = len(events(tmp_path, "apply"))
            wait_until(lambda: len(events(tmp_path, "apply")) > seen + 20, "further updates")
            assert not any(gone([process]) for process in family)
            psutil.Process(workers_of(tmp_path)[1]).send_signal(signal.SIGTERM)
            (left,) = wait_until(lambda: events(tmp_path, "leave"), "one worker leaves")
            assert left["worker"] == 1
            seen = len(events(tmp_path, "apply"))
            wait_until(lambda: len(events(tmp_path, "apply")) > seen + 20, "updates by the other one")
            psutil.Process(server).send_signal(signal.SIGTERM)
            _, err = launcher.communicate(timeout=30)
            assert launcher.returncode == 128 + signal.SIGTERM
            wait_until(lambda: gone(family), "the end of all of them")
    finally:
        signal.signal(signal.SIGHUP, former)
    said = r"(launch\.py: worker 1 left the run on SIGTERM\n)?launch\.py: interrupted by SIGTERM; iteration \d+ is kept: .*\n"
    assert re.fullmatch(said, err), err
    kept = summary(tmp_path)
    assert (kept["status"], kept["reason"], kept["incarnations"]) == ("interrupted", "SIGTERM", 1)
    assert kept["iterations"] == len(events(tmp_path, "apply"))
