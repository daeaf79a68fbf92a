"""The time at which this process started, before its first line of Python."""

from __future__ import annotations

import os
import time
from pathlib import Path

_IMPORTED = time.monotonic()


def process_began() -> float:
    """The start of this process on the monotonic clock; where the system does not tell, the import of this module."""
    try:
        # The name of the program, in parentheses, may hold anything; the start is field 22, in ticks since the machine's start.
        fields = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return _IMPORTED
    began = time.monotonic() - age
    return began if age >= 0 else _IMPORTED
