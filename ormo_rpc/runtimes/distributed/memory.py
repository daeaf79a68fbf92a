"""Memory of the processes of a run: which of them the kernel kills first, what an error of it says, and how much each has."""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path

from ormo_rpc.errors import one_line

WORKER, PRELOADER, SERVER = 600, 400, 200
"""Added by each process to its ``oom_score_adj`` of Linux, in thousandths of the memory: workers, which are replaced at once,
are killed before the server, which goes back to a checkpoint, and all of them before the launcher."""
ADVICE = "use fewer workers, a smaller train.batch_size, or give it more memory"
"""For people whose run is short of memory."""
_ALLOCATORS = ("allocate memory", "not enough memory", "out of memory", "bad_alloc", "MemoryError")
"""Words in a RuntimeError, of torch or of ours with its cause, that are about memory."""
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


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an allocation has failed, in Python or in torch; another time it may not."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _ALLOCATORS)
    )


def exit_reason(error: BaseException) -> str:
    """Type and message of the error that ends a process, on one line; the advice first where memory is short."""
    text = one_line(error).removesuffix(": ")
    return f"out of memory ({ADVICE}): {text}" if is_out_of_memory(error) else text


def resident_bytes(pid: int, proc: Path = _PROC) -> int | None:
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
