"""Resumable runs in processes of their own, several at once: they share a GPU, or the cores."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.resumable import ResumableRun
from ormo_rpc.errors import ConfigError, RunFailed

LOG = "output.log"
"""The file of what a run prints, in its folder."""
TO_END = 60.0
"""Seconds that an interrupted run has to write its last checkpoint."""
POLL_SECONDS = 0.1
_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Ended:
    """A run that has ended by itself.

    Attributes:
        number: Its place in the sequence of runs.
        seconds: Real seconds of its process.
    """

    number: int
    seconds: float


@dataclass(frozen=True)
class _Child:
    number: int
    run: ResumableRun
    process: subprocess.Popen[bytes]
    began: float


def work_through(
    runs: Sequence[ResumableRun], more: Sequence[str], *, jobs: int = 1, seconds: float = math.inf, lock: int | None = None
) -> Generator[Ended]:
    """Run them, the first ones first, and yield each that has ended; those that run when the time is up are interrupted.

    An interrupted run leaves a checkpoint. A run that fails stops none of the others. No process is left, also where
    the generator is closed early.

    Args:
        runs: The runs.
        more: Overrides that do not matter for their results.
        jobs: Runs at once.
        seconds: Their time together.
        lock: A file descriptor that the processes inherit.

    Raises:
        ConfigError: the first run that did not succeed refused its settings.
        RunFailed: it failed, or was interrupted by somebody else.
    """
    deadline = time.monotonic() + seconds
    waiting, children, failed = list(enumerate(runs)), list[_Child](), list[_Child]()
    try:
        while (waiting or children) and time.monotonic() < deadline:
            while waiting and len(children) < jobs:
                children.append(_start(*waiting.pop(0), more, lock))
            ended = [child for child in children if child.process.poll() is not None]
            children = [child for child in children if child not in ended]
            for child in ended:
                if child.process.returncode:
                    failed.append(child)
                else:
                    yield Ended(child.number, time.monotonic() - child.began)
            if not ended:
                time.sleep(POLL_SECONDS)
    finally:
        _end(children)
    if failed:
        raise _error(failed[0])


def _start(number: int, run: ResumableRun, more: Sequence[str], lock: int | None) -> _Child:
    run.folder.mkdir(parents=True, exist_ok=True)
    determined = {"folder": str(run.folder.absolute()), "overrides": [*run.overrides], "version": run.version}
    asked = json.dumps({**determined, "more": [*more]})
    with (run.folder / LOG).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "experiments.resumable", asked],
            cwd=_ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=() if lock is None else (lock,),
        )
    return _Child(number, run, process, time.monotonic())


def _error(child: _Child) -> ConfigError | RunFailed:
    log = child.run.folder / LOG
    lines = [line for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    said = lines[-1] if lines else f"exit status {child.process.returncode}"
    return ConfigError(said) if child.process.returncode == 2 else RunFailed(f"{child.run.folder}: {said}")


def _end(children: Sequence[_Child]) -> None:
    for child in children:
        child.process.terminate()
    until = time.monotonic() + TO_END
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.process.wait(max(0.0, until - time.monotonic()))
        child.process.kill()
        child.process.wait()
