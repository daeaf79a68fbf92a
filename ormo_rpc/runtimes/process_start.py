"""The time at which this process started, before its first line of Python."""

from __future__ import annotations

import os
import time

from ormo_rpc.runtimes.linux import stat_fields

_IMPORTED = time.monotonic()


def process_began() -> float:
    """The start of this process on the monotonic clock; where the system does not tell, the import of this module."""
    try:
        ticks = int(stat_fields()[19])  # since the machine's start
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return _IMPORTED
    began = time.monotonic() - age
    return began if age >= 0 else _IMPORTED
