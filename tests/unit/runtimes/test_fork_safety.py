"""Obstacles to a fork: threads, open files, shared memory and random generators, each in a process that is thrown away."""

from __future__ import annotations

import _thread
import gc
import mmap
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tqdm import tqdm
from tqdm.auto import tqdm as tqdm_auto

from ormo_rpc.runtimes.distributed.preloading import safety
from ormo_rpc.runtimes.distributed.preloading.forking import apart
from ormo_rpc.runtimes.distributed.preloading.safety import Baseline, refusal_of_generators
from ormo_rpc.runtimes.linux import LINUX

pytestmark = pytest.mark.skipif(not LINUX, reason="processes are forked on Linux alone")


def refusal_after(change: Callable[[], Any]) -> str:
    """The reason not to fork a process that has done something since its baseline."""

    def look() -> str:
        baseline = Baseline.now()
        kept = change()
        reason = baseline.refusal()
        del kept
        return reason

    return apart(look)


def sleep_for_good() -> None:
    threading.Event().wait()


def start_thread() -> None:
    threading.Thread(target=sleep_for_good, name="of the user", daemon=True).start()


def end_thread() -> None:
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()


def show_progress(bar: type[tqdm[int]] = tqdm) -> None:
    bar.monitor = None  # of another test, whose thread this forked process does not have
    for _ in bar(range(2), disable=False, file=Path(os.devnull).open("w")):  # noqa: SIM115 - of a process that ends
        pass
    assert len(threading.enumerate()) == 2  # its monitor


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (int, ""),
        (end_thread, ""),
        (show_progress, ""),
        (lambda: show_progress(tqdm_auto), ""),
        (multiprocessing.Lock, ""),
        (start_thread, "a thread was started while it was loaded: of the user"),
        (lambda: _thread.start_new_thread(sleep_for_good, ()), "threads were started while it was loaded: 1, by a library"),
        (lambda: Path(__file__).open(), f"a file was left open while it was loaded: {__file__}"),  # noqa: SIM115 - left open
        (socket.socket, "a file was left open while it was loaded: socket:"),
        (lambda: mmap.mmap(-1, 4096), "memory that processes share was made while it was loaded: /dev/zero (deleted)"),
    ],
)
def test_threads_and_what_forks_would_share_forbid_a_fork(change: Callable[[], Any], reason: str) -> None:
    found = refusal_after(change)
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


@pytest.mark.slow
def test_a_pool_of_openmp_forbids_a_fork() -> None:
    # In a process of its own: one that is forked beside a pool, which other tests leave behind, cannot make another one.
    program = (
        "import torch\n"
        "from ormo_rpc.runtimes.distributed.preloading.safety import Baseline\n"
        "torch.set_num_threads(1)\n"
        "baseline = Baseline.now()\n"
        "torch.set_num_threads(2)\n"
        "torch.ones(1 << 20).add_(1)\n"
        "print(baseline.refusal())\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.startswith("threads were started while it was loaded: 1, by a library")


def import_library(generator: random.Random) -> None:
    """Import a module, installed beside torch, that has this generator."""
    sys.modules["library"] = library = types.ModuleType("library")
    vars(library).update(__file__=torch.__file__, generator=generator)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: np.random.default_rng(), "numpy.random.Generator"),
        (lambda: np.random.RandomState(), "numpy.random.RandomState"),
        (lambda: random.Random(), "random.Random"),
        (lambda: np.random.default_rng(0), ""),
        (lambda: np.random.RandomState(0), ""),
        (lambda: np.random.default_rng(np.random.PCG64(np.random.SeedSequence([1, 2]))), ""),
        (lambda: random.SystemRandom(), ""),
        (multiprocessing.Lock, ""),  # has one for its name
        (lambda: import_library(random.Random()), ""),
    ],
)
def test_a_generator_without_a_seed_is_not_shared(make: Callable[[], object], kind: str) -> None:
    """Workers that draw noise from it would all draw the same."""

    def look() -> str:
        gc.freeze()
        kept = make()
        reason = refusal_of_generators()
        del kept
        return reason

    assert apart(look) == (f"a random generator that may have no seed was made while it was loaded: {kind}" if kind else "")


def test_a_system_that_does_not_tell_its_threads_forbids_a_fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safety, "_TASKS", tmp_path / "task")
    monkeypatch.setattr(safety, "_DESCRIPTORS", tmp_path / "fd")
    monkeypatch.setattr(safety, "_MAPPINGS", tmp_path / "maps")
    expected = f"there is no {tmp_path / 'task'}, which tells what runs in a process"
    assert apart(lambda: Baseline.now().refusal()) == expected


def test_a_gpu_in_use_forbids_a_fork() -> None:
    assert apart(lambda: Baseline.now().refusal(gpu_in_use=True)) == "CUDA was initialised while it was loaded"
