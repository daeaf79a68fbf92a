"""Helpers of tests that start real processes: launching, waiting with a time-out, reading what a run has written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

import ormo_rpc

ROOT = Path(__file__).parents[2]
"""The checkout."""
QUIET = ("logger=none",)
"""Without wandb, which takes seconds to start."""
CALM = ("heterogeneity=slow_tail", "heterogeneity.fraction=1", "heterogeneity.factor=30")
"""For endless runs in which a test waits for an event: workers sleep between gradients, and leave the cores to other tests."""
PATIENCE_SECONDS = 60.0
"""The time-out of every wait, for a busy machine."""


def wait_until(done: Callable[[], Any], what: str, every_seconds: float = 0.05) -> Any:
    """Return the first true value of ``done()``, called at this interval; fail the test after the time-out."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        value = done()
        if value:
            return value
        time.sleep(every_seconds)
    raise AssertionError(f"{what} did not happen within {PATIENCE_SECONDS} s")


@contextmanager
def launched(*command: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> Generator[subprocess.Popen[str]]:
    """Start Python with a command in a session of its own; at the end kill what is left of its processes.

    Args:
        command: The arguments of Python.
        cwd: The working directory.
        env: Variables beside those of the tests, which pass no variable of wandb's on.
    """
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env={key: value for key, value in os.environ.items() if not key.startswith("WANDB_")} | dict(env or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_heed_interrupts,
    )
    family = [psutil.Process(process.pid)]
    try:
        yield process
    finally:
        family += descendants(process.pid)
        for member in family:
            if member.is_running():
                member.kill()
        process.wait(PATIENCE_SECONDS)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def _heed_interrupts() -> None:
    """Undo what a shell does to commands in the background: they, and all that they start, ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def launch(run_dir: Path, *overrides: str, env: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    """Run ``launch.py`` to its end; return its exit status, standard output and standard error."""
    with launched("launch.py", f"hydra.run.dir={run_dir}", *overrides, env=env) as process:
        out, err = process.communicate(timeout=2 * PATIENCE_SECONDS)
        return process.returncode, out, err


def descendants(pid: int) -> list[psutil.Process]:
    """The processes that a process has started, directly or not."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def processes(run_dir: Path) -> dict[str, Any]:
    """Wait until training has begun; return the content of ``processes.json``."""
    wait_until(lambda: len(events(run_dir, "apply")) > 20, "the first updates")
    return json.loads((run_dir / "processes.json").read_text())


def events(run_dir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The events of a run's trace, all or those of a kind, without a line that is still being written."""
    file = run_dir / "trace.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.is_file() else []
    found = [json.loads(line) for line in lines]
    return [event for event in found if kind in (None, event["event"])]


def check_lineage(run_dir: Path, total: int) -> None:
    """Every iteration in order, and every ticket exactly once."""
    applied = events(run_dir, "apply")
    assert [event["iteration"] for event in applied] == list(range(total))
    assert sorted(event["ticket"] for event in applied) == list(range(total))


def first(found: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """The first event that has these values."""
    return next(event for event in found if all(event.get(key) == value for key, value in wanted.items()))


def summary(run_dir: Path) -> dict[str, Any]:
    """The summary of a run."""
    return json.loads((run_dir / "summary.json").read_text())


def gone(found: list[psutil.Process]) -> bool:
    """Check that all of these processes have ended."""
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in found)


def replayed(run_dir: Path, again: Path) -> str:
    """Replay a recorded run; return the hash of its final parameters."""
    summary = ormo_rpc.train(["runtime=replay", f"replay.run={run_dir}"], run_dir=again)
    assert summary["identical"] is True
    return summary["final_params_sha256"]
