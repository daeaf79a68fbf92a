"""Errors that mean that the machine has no more of something, and may not come again; each with the limit to raise."""

from __future__ import annotations

import errno

from ormo_rpc.errors import one_line

MEMORY = "use fewer workers, a smaller train.batch_size, or give it more memory"
_PROCESSES = "no further process or thread is allowed: raise ulimit -u, or pids.max of the control group"
_DESCRIPTORS = "no descriptor is left: raise ulimit -n"
_BY_NUMBER = {
    errno.EMFILE: _DESCRIPTORS,
    errno.ENFILE: "the machine has no descriptor left: raise fs.file-max by sysctl",
    errno.EAGAIN: _PROCESSES,
    errno.ENOMEM: MEMORY,
}
"""By the number of an error of the system."""
_BY_WORDS = {
    "allocate memory": MEMORY,
    "not enough memory": MEMORY,
    "out of memory": MEMORY,
    "bad_alloc": MEMORY,
    "MemoryError": MEMORY,
    "start new thread": _PROCESSES,
    "too many open files": _DESCRIPTORS,
}
"""By words in a RuntimeError: of torch, of Python about threads, or of ours that has its cause in its text."""
_MOST = 200
"""Characters of an error beside the limit."""


def limit_reached(error: BaseException) -> str:
    """The limit that an error is about, and what to do; empty where it is about none."""
    if isinstance(error, MemoryError):
        return MEMORY
    if isinstance(error, OSError):
        return _BY_NUMBER.get(error.errno or 0, "")
    if isinstance(error, RuntimeError):
        return next((limit for words, limit in _BY_WORDS.items() if words in str(error)), "")
    return ""


def reason_of_start(error: OSError) -> str:
    """The system's reason why a process could not be started, and the limit to raise."""
    reason, limit = error.strerror or str(error), limit_reached(error)
    return f"{reason}{f': {error.filename}' if error.filename else ''}{f' ({limit})' if limit else ''}"


def reason_of_end(error: BaseException) -> str:
    """Type and message of the error that ends a process, on one line, and the limit to raise."""
    text, limit = one_line(error).removesuffix(": "), limit_reached(error)
    return f"{text[:_MOST]} ({limit})" if limit else text
