"""Reasons why a process must not be forked, and why what it has read is not for others.

A fork has the memory of all threads, but runs the one that forked: a lock that another thread held stays locked in it for good,
and a pool of threads has none. A file that is open in both has one position for both, memory that is shared is written to by
both, and a random generator goes on from the same state in both.
"""

from __future__ import annotations

import contextlib
import gc
import random
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.random
import torch

from ormo_rpc.options.imports import LIBRARIES, users_line
from ormo_rpc.runtimes.linux import LINUX

_TASKS, _DESCRIPTORS, _MAPPINGS = Path("/proc/self/task"), Path("/proc/self/fd"), Path("/proc/self/maps")
_JOINED_SECONDS = 0.2
_GENERATOR = "a random generator that may have no seed was made while it was loaded"
_OF_NO_FILE = "(deleted)"
_SEMAPHORE = "/dev/shm/sem."  # noqa: S108 - nothing of ours
"""Locks of multiprocessing, such as that of tqdm, which hold no numbers."""
_GPU_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))


def number_of_threads() -> int:
    """Threads of this process, also those that are none of Python's."""
    return len(list(_TASKS.iterdir())) if _TASKS.is_dir() else threading.active_count()


def _more_threads_than(number: int) -> int:
    """The number of threads beyond this one; a thread that was joined takes a moment to be gone."""
    deadline = time.monotonic() + _JOINED_SECONDS
    while (more := number_of_threads() - number) > 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    return max(0, more)


def _names_of_threads() -> str:
    """The names that the system has for the threads of this process, each once."""
    names: set[str] = set()
    for task in _TASKS.iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            names.add((task / "comm").read_text().strip())
    return ", ".join(sorted(names))


def open_descriptors() -> dict[int, str]:
    """The target of each open descriptor."""
    found: dict[int, str] = {}
    for file in _DESCRIPTORS.iterdir() if _DESCRIPTORS.is_dir() else ():
        try:
            found[int(file.name)] = str(file.readlink())
        except OSError:  # that of the look itself
            continue
    return found


def shared_memory() -> dict[str, str]:
    """The names of memory, by its addresses, that this process and its forks, but no other process, would write to together."""
    found: dict[str, str] = {}
    for line in _MAPPINGS.read_text().splitlines() if _MAPPINGS.is_file() else ():
        addresses, flags, _, _, _, *name = line.split(maxsplit=5)
        target = "".join(name)
        if (
            flags.startswith("rw")
            and flags.endswith("s")
            and target.endswith(_OF_NO_FILE)
            and not target.startswith(_SEMAPHORE)
        ):
            found[addresses] = target
    return found


def refusal_of_generators() -> str:
    """The reason not to share what was made since the collector's objects were frozen: a random generator without a seed.

    All forks would draw the same from it, and so would a replacement again. Those of Python do not tell whether they were
    seeded; those of numpy have a number of 128 bits from the system where they were not.
    """
    made = gc.get_objects()
    gc.unfreeze()  # for those that a frozen object has
    for each in made:
        kind: type[Any] = type(each)
        if kind is random.Random and not _is_of_a_library(each):
            return f"{_GENERATOR}: random.Random"
        if issubclass(kind, (numpy.random.Generator, numpy.random.RandomState)):
            source = each.bit_generator if issubclass(kind, numpy.random.Generator) else each._bit_generator
            entropy = getattr(source.seed_seq, "entropy", 0)
            if isinstance(entropy, int) and entropy >> 64:
                return f"{_GENERATOR}: numpy.random.{kind.__name__}"
    return ""


def _is_of_a_library(generator: random.Random) -> bool:
    """Tell that a module or class of a library has made it for itself, or `tempfile`, which makes another one in a fork."""
    for owner in gc.get_referrers(generator):
        names: dict[str, Any] = owner if isinstance(owner, dict) else {}
        if type(owner).__module__ == "tempfile" or "_rng_pid" in names:  # its object, or the attributes of that
            return True
        module = sys.modules.get(str(names.get("__module__", names.get("__name__"))))
        if str(getattr(module, "__file__", None)).startswith(LIBRARIES):
            return True
    return False


@dataclass(frozen=True)
class Baseline:
    """This process once it has imported what every process needs.

    Attributes:
        threads: The number of its threads: one, and those of BLAS, which ends them at a fork and starts them again.
        descriptors: Its open descriptors.
        shared: Its memory that forks would share.
    """

    threads: int
    descriptors: dict[int, str]
    shared: dict[str, str]

    @classmethod
    def now(cls) -> Baseline:
        """Take it."""
        return cls(number_of_threads(), open_descriptors(), shared_memory())

    def refusal(self, *, gpu_in_use: bool = False) -> str:
        """The reason why this process must not be forked; empty where it may be.

        Args:
            gpu_in_use: A process that was forked from it had found that it cannot use the GPU any more (`gpu_is_lost`).
        """
        if not LINUX:
            return f"{sys.platform} is not Linux"
        if not _TASKS.is_dir():
            return f"there is no {_TASKS}, which tells what runs in a process"
        _end_monitors_of_tqdm()
        others = [_named(thread) for thread in threading.enumerate() if thread is not threading.current_thread()]
        if others:
            return f"a thread was started while it was loaded: {', '.join(others)}"
        if more := _more_threads_than(self.threads):
            return f"threads were started while it was loaded: {more}, by a library such as OpenMP ({_names_of_threads()})"
        if torch.cuda.is_initialized() or gpu_in_use:
            return "CUDA was initialised while it was loaded"
        opened = [target for number, target in open_descriptors().items() if self.descriptors.get(number) != target]
        if opened:
            return f"a file was left open while it was loaded: {', '.join(opened[:3])}"
        if shared := [name for addresses, name in shared_memory().items() if addresses not in self.shared]:
            return f"memory that processes share was made while it was loaded: {', '.join(shared[:3])}"
        return ""


def _named(thread: threading.Thread) -> str:
    """The name of a thread, and the line of the user's that it is at."""
    frame = sys._current_frames().get(thread.ident or 0)  # pyright: ignore[reportPrivateUsage] # documented by Python
    place = "" if frame is None else users_line(frame)
    return f"{thread.name} at {place}" if place else thread.name


def gpu_is_lost() -> bool:
    """Tell whether this forked process cannot use the machine's GPU, as its parent has looked at it."""
    return torch.cuda._is_in_bad_fork() and any(file.exists() for file in _GPU_DRIVERS)  # pyright: ignore[reportPrivateUsage] # nothing public tells it


def _end_monitors_of_tqdm() -> None:
    """End the thread that a kind of tqdm's progress bars starts with the first one; the next one starts it again."""
    kind: Any = getattr(sys.modules.get("tqdm"), "TMonitor", None)
    monitors: list[Any] = [] if kind is None else [each for each in threading.enumerate() if isinstance(each, kind)]
    for monitor in monitors:
        monitor.exit()
        monitor.tqdm_cls.monitor = None
