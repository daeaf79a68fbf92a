"""Counters of a run that survive the SIGKILL of the server process."""

from __future__ import annotations

import mmap
import os
import struct
import sys
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
    """

    _COUNTS = struct.Struct("<3qd")
    _FILE = "progress"

    def __init__(self, run_dir: Path) -> None:
        with (run_dir / self._FILE).open("a+b") as file:
            file.truncate(self._COUNTS.size)
            if sys.platform.startswith("linux"):  # else a store to memory without room on the disk would end the process
                os.posix_fallocate(file.fileno(), 0, self._COUNTS.size)
            self._memory = mmap.mmap(file.fileno(), self._COUNTS.size)
        self.iterations, self.incarnations, self.rolled_back, self.start_seconds = self._COUNTS.unpack(self._memory)

    @classmethod
    def incarnations_of(cls, run_dir: Path) -> int:
        """Server processes that a run has had so far; 0 for a run that has not begun."""
        file = run_dir / cls._FILE
        return struct.unpack_from("<2q", file.read_bytes())[1] if file.is_file() else 0

    def begin(self, iterations: int) -> None:
        """Count a new server process, which begins with this many gradients applied."""
        self.incarnations += 1
        self.rolled_back += max(0, self.iterations - iterations)
        self.set_iterations(iterations)

    def set_iterations(self, iterations: int) -> None:
        """Set the number of gradients applied."""
        self.iterations = iterations
        self._write()

    def set_start_seconds(self, seconds: float) -> None:
        """Set the seconds to the first ticket, unless an earlier server process has handed it out."""
        self.start_seconds = self.start_seconds or seconds
        self._write()

    def _write(self) -> None:
        self._COUNTS.pack_into(self._memory, 0, self.iterations, self.incarnations, self.rolled_back, self.start_seconds)
