"""Counters of a run that survive the SIGKILL of the server process."""

from __future__ import annotations

import mmap
import os
import struct
import sys
import time
from pathlib import Path


class RunCounters:
    """Counters in the memory-mapped file ``progress``, exact at the moment of a SIGKILL.

    The trace lags behind by the time between two flushes of the recorder. These counters do not, and cost the update path no
    more than a store to memory.

    Args:
        run_dir: The run directory.

    Raises:
        OSError: the disk is full or read-only.

    Attributes:
        iterations: Gradients applied.
        incarnations: Server processes so far, this one included once `begin` was called.
        rolled_back: Updates undone because a server process died.
        start_seconds: Real seconds from the beginning of the run to its first ticket; 0 before.
        updated_seconds: Real seconds from the same beginning to the last applied gradient; where this process has applied none,
            and what was applied is undone, to its own beginning.
    """

    _COUNTS = struct.Struct("<3q3d")
    _FILE = "progress"

    def __init__(self, run_dir: Path) -> None:
        with (run_dir / self._FILE).open("a+b") as file:
            file.truncate(self._COUNTS.size)
            if sys.platform.startswith("linux"):  # else a store to memory without room on the disk would end the process
                os.posix_fallocate(file.fileno(), 0, self._COUNTS.size)
            self._memory = mmap.mmap(file.fileno(), self._COUNTS.size)
        self.iterations, self.incarnations, self.rolled_back, self.start_seconds, self.updated_seconds, self._began_at = (
            self._COUNTS.unpack(self._memory)
        )

    @classmethod
    def incarnations_of(cls, run_dir: Path) -> int:
        """Server processes that a run has had so far; 0 for a run that has not begun."""
        file = run_dir / cls._FILE
        return struct.unpack_from("<2q", file.read_bytes())[1] if file.is_file() else 0

    @classmethod
    def began(cls, run_dir: Path, began: float) -> float:
        """Return when the run was first started, on the monotonic clock of this machine.

        Between two starts, by torchrun or Slurm, the system's clock counts, as they may be on two machines.

        Args:
            run_dir: The run directory.
            began: The time at which this start began; returned where it is the first.
        """
        file = run_dir / cls._FILE
        content = file.read_bytes() if file.is_file() else b""
        first = cls._COUNTS.unpack(content)[-1] if len(content) == cls._COUNTS.size else 0.0
        return began - max(0.0, _system_time(began) - first) if first else began

    def begin(self, iterations: int, began: float) -> None:
        """Count a new server process.

        Args:
            iterations: The gradients that are applied already.
            began: The time at which the run began, on the monotonic clock.
        """
        self.incarnations += 1
        self.rolled_back += max(0, self.iterations - iterations)
        self._began_at = self._began_at or _system_time(began)
        kept = 0 < self.iterations <= iterations
        self.set_iterations(iterations, self.updated_seconds if kept else time.monotonic() - began)

    def set_iterations(self, iterations: int, updated_seconds: float) -> None:
        """Set the number of gradients applied, and the seconds from the beginning of the run to the last of them."""
        self.iterations, self.updated_seconds = iterations, updated_seconds
        self._write()

    def set_start_seconds(self, seconds: float) -> None:
        """Set the seconds to the first ticket, unless an earlier server process has handed it out."""
        self.start_seconds = self.start_seconds or seconds
        self._write()

    def _write(self) -> None:
        counts = self.iterations, self.incarnations, self.rolled_back
        self._COUNTS.pack_into(self._memory, 0, *counts, self.start_seconds, self.updated_seconds, self._began_at)


def _system_time(moment: float) -> float:
    """Convert a monotonic time to system time."""
    return time.time() - (time.monotonic() - moment)
