"""Reasons why a process must not be forked, and why what it has read is not for others.

A fork has the memory of all threads, but runs the one that forked: a lock that another thread held stays locked in it for good,
and a pool of threads has none. A file that is open in both has one position for both.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from ormo_rpc.runtimes.distributed.linux import LINUX

_TASKS, _DESCRIPTORS = Path("/proc/self/task"), Path("/proc/self/fd")
_GPU_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))


def number_of_threads() -> int:
    """Threads of this process, also those that are none of Python's."""
    return len(list(_TASKS.iterdir())) if LINUX else threading.active_count()


def open_descriptors() -> dict[int, str]:
    """What each open descriptor leads to."""
    found: dict[int, str] = {}
    for file in _DESCRIPTORS.iterdir() if LINUX else ():
        try:
            found[int(file.name)] = str(file.readlink())
        except OSError:  # that of the look itself
            continue
    return found


@dataclass(frozen=True)
class Baseline:
    """This process once it has imported what every process needs.

    Attributes:
        threads: The number of its threads: one, and those of BLAS, which ends them at a fork and starts them again.
        descriptors: Its open descriptors.
    """

    threads: int
    descriptors: dict[int, str]

    @classmethod
    def now(cls) -> Baseline:
        """Take it."""
        return cls(number_of_threads(), open_descriptors())

    def refusal(self, *, gpu_in_use: bool = False) -> str:
        """The reason why this process must not be forked; empty where it may be.

        Args:
            gpu_in_use: A process that was forked from it had found that it cannot use the GPU any more (`gpu_is_lost`).
        """
        if not LINUX:
            return f"{sys.platform} is not Linux"
        _end_monitor_of_tqdm()
        others = [thread.name for thread in threading.enumerate() if thread is not threading.current_thread()]
        if others:
            return f"a thread was started while it was loaded: {', '.join(others)}"
        if number_of_threads() > self.threads:
            return f"threads were started while it was loaded: {number_of_threads() - self.threads} that are none of Python's"
        if torch.cuda.is_initialized() or gpu_in_use:
            return "CUDA was initialised while it was loaded"
        opened = [target for number, target in open_descriptors().items() if self.descriptors.get(number) != target]
        if opened:
            return f"a file was left open while it was loaded: {', '.join(opened[:3])}"
        return ""


def gpu_is_lost() -> bool:
    """Tell whether this forked process cannot use the machine's GPU, as its parent has looked at it."""
    return torch.cuda._is_in_bad_fork() and any(file.exists() for file in _GPU_DRIVERS)  # pyright: ignore[reportPrivateUsage] # nothing public tells it


def _end_monitor_of_tqdm() -> None:
    """End the thread that tqdm starts with the first progress bar; the next one starts it again."""
    module = sys.modules.get("tqdm")
    monitor = getattr(getattr(module, "tqdm", None), "monitor", None)
    if monitor is not None:
        monitor.exit()
        module.tqdm.monitor = None  # pyright: ignore[reportOptionalMemberAccess] # it was found through it
