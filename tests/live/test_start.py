"""The start of processes: forked and spawned alike, with data once in memory, and without the preloaders that were killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from ormo_rpc.config.parsing import parse_config
from ormo_rpc.runtimes.distributed.preloading.client import JOBS
from ormo_rpc.runtimes.distributed.preloading.preloading import Preloading
from ormo_rpc.runtimes.linux import LINUX
from tests.support import large_data
from tests.support.processes import CALM, QUIET, descendants, events, launch, launched, processes, summary, wait_until

pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(180),
    pytest.mark.skipif(not LINUX, reason="processes are forked on Linux alone"),
]


def proportional_bytes(process: psutil.Process) -> int:
    """Its memory, with a share of every page that others have as well."""
    return int(process.memory_full_info().pss)


def test_forked_and_spawned_processes_end_with_the_same_parameters(tmp_path: Path) -> None:
    """With one worker the order of the gradients is given."""
    for start in ("fork", "spawn"):
        options = ("workers=1", "train.max_iterations=60", f"runtime.start={start}")
        status, _, err = launch(tmp_path / start, *QUIET, *options)
        assert (status, err) == (0, "")
    forked, spawned = (summary(tmp_path / start) for start in ("fork", "spawn"))
    assert forked["final_params_sha256"] == spawned["final_params_sha256"]
    assert (forked["start"], spawned["start"]) == ("fork", "spawn: runtime.start=spawn")


def test_the_death_of_the_preloaders_harms_nobody_and_nothing_outlives_the_launcher(tmp_path: Path) -> None:
    options = (*CALM, "workers=2", "train.epochs=100000", "runtime.restart_backoff_seconds=0", "checkpoint.every_seconds=0")
    with launched("launch.py", *QUIET, f"hydra.run.dir={tmp_path}", *options) as launcher:
        found = processes(tmp_path)
        assert found["start"] == "fork"
        children = {child.pid: " ".join(child.cmdline()) for child in psutil.Process(launcher.pid).children()}
        preloaders = [pid for pid, words in children.items() if JOBS.preloader in words]
        assert len(preloaders) == 2
        for pid in (found["server"], *found["workers"].values()):  # named as if they had been spawned
            assert JOBS.child in children[pid]
        for pid in preloaders:
            os.kill(pid, signal.SIGKILL)
        count = len(events(tmp_path, "apply"))
        wait_until(lambda: len(events(tmp_path, "apply")) > count + 20, "work without preloaders")
        for _ in range(2):  # spawned meanwhile, or forked from another preloader
            killed = processes(tmp_path)["workers"]["0"]
            os.kill(killed, signal.SIGKILL)
            wait_until(lambda: processes(tmp_path)["workers"].get("0") not in (None, killed), "a replacement")  # noqa: B023 - called before the next
        family = [psutil.Process(launcher.pid), *descendants(launcher.pid)]
        launcher.kill()
        wait_until(lambda: not any(each.is_running() and each.status() != "zombie" for each in family), "the end of all")


def test_data_lies_once_in_memory(tmp_path: Path) -> None:
    """Spawned, each of four processes would have a data set of its own, and the rest besides."""
    data = (f"dataset._target_={large_data.__name__}.data", "workers=3", "train.epochs=100000", "checkpoint.every_seconds=0")
    with launched("launch.py", *QUIET, f"hydra.run.dir={tmp_path}", *data, "model=mlp", "train.batch_size=2") as launcher:
        found = processes(tmp_path)
        assert found["start"] == "fork"
        sharing = [psutil.Process(pid) for pid in (found["server"], *found["workers"].values())]
        shared = sum(map(proportional_bytes, sharing))
        alone = sum(process.memory_full_info().uss for process in sharing)
        assert alone < large_data.BYTES  # what only one process has
        assert shared < len(sharing) * large_data.BYTES
        launcher.send_signal(signal.SIGINT)
        launcher.communicate(timeout=60)


def test_what_must_not_be_shared_is_loaded_by_each_process() -> None:
    """Two processes that read from one open file would get each other's samples."""
    ways = {
        "data": "fork",
        "from_open_file": "fork, each process loads the job: a file was left open while it was loaded: ",
        "with_thread": "fork, each process loads the job: a thread was started while it was loaded: of the data",
    }
    with Preloading() as preloading:
        for function, way in ways.items():
            values = {"workers": 2, "logger": "none", "dataset": {"_target_": f"{large_data.__name__}.{function}"}}
            preloading.load(parse_config(values), starts_server=True)
            assert preloading.way.startswith(way)
            assert (preloading.way == "fork") == (way == "fork")
