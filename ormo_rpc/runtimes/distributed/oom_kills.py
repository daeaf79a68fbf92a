"""The kernel's kills for lack of memory: the counters of Linux, and what they say about children that SIGKILL has ended.

A control group counts the processes of its own that were killed, whichever limit was reached, and the children are in the
launcher's: a count that rises by as much as children have died names them. The counter of the machine (``/proc/vmstat``), for
where there is no control group, includes processes of everybody.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

LOOK_SECONDS = 1.0
"""The interval at which the counter is read while no child has died."""
RELATED_SECONDS = 10.0
"""A kill that was counted longer ago has nothing to do with a child that has ended now; a large one takes a while to end."""
_COUNTER = "oom_kill"


class OomKills:
    """Follows the counter.

    Args:
        proc: Of this machine.
        cgroups: The folder of the control groups.
    """

    def __init__(self, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> None:
        group = _own_counter(proc, cgroups)
        self._counter = group or proc / "vmstat"
        self._where = "in this control group" if group else "on this machine"
        self._is_ours = group is not None
        self._count = self._read()
        self._looked_at = time.monotonic()
        self._counted: list[float] = []
        """Times at which kills were counted that no child is known to have died of."""

    def look(self) -> None:
        """Note new kills; to be called again and again, as a kill is told by when it came."""
        if time.monotonic() - self._looked_at >= LOOK_SECONDS:
            self._note()

    def cause(self, killed: int) -> str:
        """Tell whether memory is why children have ended by a SIGKILL that is not ours.

        Args:
            killed: Their number; each kill explains one of them.

        Returns:
            Words for people; empty where memory has no part in it.
        """
        self._note()
        kills = [at for at in self._counted if time.monotonic() - at <= RELATED_SECONDS]
        self._counted = kills[killed:]
        if not kills:
            return ""
        if self._is_ours and len(kills) >= killed:
            return "by the kernel for lack of memory"
        return f"maybe by the kernel for lack of memory (kills just now {self._where}: {len(kills)})"

    def _note(self) -> None:
        now, count = time.monotonic(), self._read()
        self._looked_at = now
        if count is not None:
            self._counted += [now] * (0 if self._count is None else count - self._count)
            self._count = count

    def _read(self) -> int | None:
        with contextlib.suppress(OSError, ValueError):  # no such file, or no descriptor is left
            for line in self._counter.read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == _COUNTER:
                    return int(value)
        return None


def _own_counter(proc: Path, cgroups: Path) -> Path | None:
    """The file of this process's control group with the counter, of version 1 or 2; None where there is none."""
    found: list[Path] = []
    with contextlib.suppress(OSError, ValueError):
        for line in (proc / "self" / "cgroup").read_text().splitlines():
            number, controllers, group = line.split(":", 2)
            within = group.lstrip("/")
            if number == "0":  # below unified/ beside version 1, which then has the memory
                found += [cgroups / at / name for at in (within, "") for name in ("memory.events.local", "memory.events")]
            elif "memory" in controllers.split(","):
                found += [cgroups / "memory" / at / "memory.oom_control" for at in (within, "")]
    # In a container the path may be that of the machine, and what is mounted the container's own group.
    return next((file for file in found if _has_counter(file)), None)


def _has_counter(file: Path) -> bool:
    with contextlib.suppress(OSError):
        return any(line.startswith(f"{_COUNTER} ") for line in file.read_text().splitlines())
    return False
