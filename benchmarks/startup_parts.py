"""The parts of `startup`: each runs the command line of a checkout once, and returns its figures by name."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.before_after import Checkout
from benchmarks.systems import started
from ormo_rpc.runtimes.distributed.memory import proportional_bytes

LIMIT_SECONDS = 240.0
"""Of each command, and of each wait for something to happen in a run."""
MANY = 32
SWEPT = ("ormo", "asgd", "dana", "smega2")
LONG = ("train.epochs=1000000", "train.max_seconds=600")
"""A run that lasts until it is killed."""
ON_CIFAR = 16
"""Workers of the measurement of memory: those that share nothing take two thirds of a GB each, which 32 may not find."""
GRADIENTS_FOR_MEMORY = 2 * ON_CIFAR
_PROGRESS = struct.Struct("<3q")
"""The file ``progress``: gradients applied, server processes, updates rolled back."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Something that is measured.

    Attributes:
        measure: Runs it for a checkout, in a folder that is empty.
        dear: It takes so long that it is measured in fewer rounds.
    """

    measure: Callable[[Checkout, Path], dict[str, float]]
    dear: bool = False


def figures_of(part: Part, checkout: Checkout) -> dict[str, float]:
    """Measure a part once; no process of it is left.

    Raises:
        RuntimeError: it failed; the text says why.
    """
    with tempfile.TemporaryDirectory(prefix="startup_") as folder:
        try:
            return part.measure(checkout, Path(folder))
        except (OSError, KeyError, psutil.Error, subprocess.TimeoutExpired) as error:  # such as of a run that has died
            raise RuntimeError(f"{checkout.name}: {type(error).__name__}: {error}") from None


def default_run(checkout: Checkout, folder: Path) -> dict[str, float]:
    """Enter to prompt of the default run."""
    return {"default run": _seconds(checkout, [f"hydra.run.dir={folder / 'run'}"])}


def many_workers(checkout: Checkout, folder: Path) -> dict[str, float]:
    """Enter to prompt of the default run with 32 workers."""
    return {f"workers={MANY}": _seconds(checkout, [f"workers={MANY}", f"hydra.run.dir={folder / 'run'}"])}


def sweep(checkout: Checkout, folder: Path) -> dict[str, float]:
    """Seconds for each job of a sweep after the first: from the line that announces the second one to the prompt."""
    arguments = ["-m", f"algorithm={','.join(SWEPT)}", f"hydra.sweep.dir={folder / 'sweep'}"]
    with started(_command(checkout, arguments), checkout.variables(), checkout.folder) as process:
        assert process.stdout is not None
        announced = [time.monotonic() for line in process.stdout if line.startswith("job ")]
        process.wait(LIMIT_SECONDS)
        ended = time.monotonic()
    if process.returncode != 0 or len(announced) != len(SWEPT):
        raise RuntimeError(f"{checkout.name}: a sweep of {len(SWEPT)} runs ended with {process.returncode}")
    return {"job of a sweep after the first": (ended - announced[1]) / (len(SWEPT) - 1)}


def refusal(checkout: Checkout, folder: Path) -> dict[str, float]:
    """Enter to prompt of a wrong key, and of ``--help``."""
    wrong = _seconds(checkout, ["train.lrr=0.1", f"hydra.run.dir={folder / 'run'}"], status=2)
    return {"wrong key refused": wrong, "--help": _seconds(checkout, ["--help"])}


def recovery(checkout: Checkout, folder: Path) -> dict[str, float]:
    """SIGKILL of a worker to the first gradient of its replacement, less the back-off; of the server to the next gradient."""
    run_dir, backoff_seconds = folder / "run", 0.5
    with _running(checkout, run_dir, [*LONG, f"runtime.restart_backoff_seconds={backoff_seconds}"]):
        _wait_for(lambda: _progress(run_dir)[0] >= 500 and _processes(run_dir), "a run")
        worker = 1
        applied = _progress(run_dir)[0]
        os.kill(int(_processes(run_dir)["workers"][str(worker)]), signal.SIGKILL)
        replaced = _wait_for(lambda: _first_of_replacement(run_dir, worker, applied), "a replacement")
        time.sleep(1.0)  # so that the two recoveries are apart
        _, incarnations, _ = _progress(run_dir)
        killed = time.monotonic()
        os.kill(int(_processes(run_dir)["server"]), signal.SIGKILL)
        _wait_for(lambda: _progress(run_dir)[1] > incarnations, "another server")
        resumed_at = _progress(run_dir)[0]
        _wait_for(lambda: _progress(run_dir)[0] > resumed_at, "a gradient")
        server = time.monotonic() - killed
    return {"worker's replacement, less the back-off": replaced - backoff_seconds, "server's replacement": server}


def memory(checkout: Checkout, folder: Path) -> dict[str, float]:
    """The largest proportional set size of all processes together, with 16 workers on CIFAR-10-sized data, in MB."""
    run_dir = folder / "run"
    _write_cifar10(folder)
    data = ["dataset=cifar10", f"dataset.root={folder}", "dataset.verify=false", "model=resnet20"]
    arguments = [*LONG, f"workers={ON_CIFAR}", "logger=none", *data]
    largest = 0
    with _running(checkout, run_dir, arguments) as process:

        def warm() -> bool:
            nonlocal largest
            largest = max(largest, bytes_of_all(process.pid))
            time.sleep(0.5)
            return _progress(run_dir)[0] >= GRADIENTS_FOR_MEMORY

        _wait_for(warm, f"{GRADIENTS_FOR_MEMORY} gradients")
    return {f"memory of {ON_CIFAR} workers on CIFAR-10, MB": largest / 1e6}


PARTS: Mapping[str, Part] = {
    "default": Part(measure=default_run),
    "recovery": Part(measure=recovery),
    "refusal": Part(measure=refusal),
    "many": Part(measure=many_workers, dear=True),
    "sweep": Part(measure=sweep, dear=True),
    "memory": Part(measure=memory, dear=True),
}


def bytes_of_all(pid: int) -> int:
    """The sum of the proportional set sizes of a process and all that it has started: shared pages count once in all."""
    pids = (pid, *(child.pid for child in psutil.Process(pid).children(recursive=True)))
    return sum(proportional_bytes(each) or 0 for each in pids)  # none of one that has ended


def first_of_replacement(lines: Sequence[str], worker: int, applied: int) -> float | None:
    """Seconds from a gradient, the newest one when a worker was killed, to the first one of the worker's replacement.

    Args:
        lines: Of the trace.
        worker: The one that was killed.
        applied: Gradients applied by then.

    Returns:
        None where there is none yet.
    """
    killed: float | None = None
    joined = False
    for line in lines[1:]:  # the header comes first
        event = json.loads(line)
        if event["event"] == "apply" and event["iteration"] == applied - 1:
            killed = event["seconds"]
        elif killed is not None and event.get("worker") == worker:
            joined = joined or event["event"] == "join"
            if joined and event["event"] == "apply":
                return event["seconds"] - killed
    return None


def _first_of_replacement(run_dir: Path, worker: int, applied: int) -> float | None:
    time.sleep(0.2)
    return first_of_replacement((run_dir / "trace.jsonl").read_text().rpartition("\n")[0].splitlines(), worker, applied)


def _command(checkout: Checkout, arguments: Sequence[str]) -> list[str]:
    return [str(checkout.python), "launch.py", *arguments]


def _seconds(checkout: Checkout, arguments: Sequence[str], *, status: int = 0) -> float:
    """Seconds of a command from its start to its end.

    Raises:
        RuntimeError: it ended with another status.
    """
    began = time.monotonic()
    with started(_command(checkout, arguments), checkout.variables(), checkout.folder) as process:
        _, err = process.communicate(timeout=LIMIT_SECONDS)
        seconds = time.monotonic() - began
    if process.returncode != status:
        last = (err.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"{checkout.name}: {' '.join(arguments)}: {last} (exit status {process.returncode})")
    return seconds


@contextlib.contextmanager
def _running(checkout: Checkout, run_dir: Path, arguments: Sequence[str]) -> Generator[subprocess.Popen[str]]:
    command = _command(checkout, [*arguments, f"hydra.run.dir={run_dir}"])
    with started(command, checkout.variables(), checkout.folder) as process:
        yield process


def _wait_for(found: Callable[[], Any], what: str) -> Any:
    """Wait until something is there, looking every millisecond.

    Raises:
        TimeoutError: it does not come.
    """
    deadline = time.monotonic() + LIMIT_SECONDS
    while True:
        value = found()
        if value:
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"got no {what} within {LIMIT_SECONDS:g} seconds")
        time.sleep(0.001)


def _progress(run_dir: Path) -> tuple[int, int, int]:
    try:
        return _PROGRESS.unpack_from((run_dir / "progress").read_bytes())
    except (OSError, struct.error):  # the run has not begun
        return 0, 0, 0


def _processes(run_dir: Path) -> dict[str, Any]:
    try:
        return json.loads((run_dir / "processes.json").read_text())
    except OSError:
        return {}


def _write_cifar10(root: Path) -> None:
    """Write files of CIFAR-10's form and size, with random pixels."""
    folder, numbers = root / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir()
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        images = numbers.integers(0, 256, (10_000, 3072), dtype=np.uint8)
        content = {"data": images, "labels": numbers.integers(0, 10, 10_000).tolist()}
        (folder / name).write_bytes(pickle.dumps(content, protocol=4))
