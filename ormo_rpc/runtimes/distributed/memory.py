"""Memory of the processes of a run: which of them the kernel kills first, and how much each has."""

from __future__ import annotations

import contextlib
from pathlib import Path

WORKER, PRELOADER, SERVER = 900, 400, 200
"""Added by each process to its ``oom_score_adj`` of Linux, in thousandths of the memory: workers, which are replaced at once,
are killed before the server, which goes back to a checkpoint, and all of them before the launcher."""
_MOST = 1000
_PROC = Path("/proc")
_inherited: list[int] = []
"""The value before this process, or the one that it was forked from, has raised it; empty where none has."""


def raise_oom_score(by: int, proc: Path = _PROC) -> None:
    """Offer this process to the kernel, should memory run out, before the launcher and in the order of the roles.

    Nothing happens where this is not Linux, or not allowed.
    """
    file = proc / "self" / "oom_score_adj"
    with contextlib.suppress(OSError, ValueError):
        if not _inherited:
            _inherited.append(int(file.read_text()))
        file.write_text(str(min(_MOST, _inherited[0] + by)))


def proportional_bytes(pid: int, proc: Path = _PROC) -> int | None:
    """The proportional set size of a process: a page that n processes share counts as its nth part.

    The kernel looks at each page for it, which takes 50 to 100 ms for 500 MB.

    Returns:
        None where it cannot be read.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (proc / str(pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return None
