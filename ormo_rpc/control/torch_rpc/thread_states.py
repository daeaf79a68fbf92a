"""Keep Python's state of the agent's threads: torch makes one, and frees it again, for each of seven steps of a call.

A thread of C++ gets a state of the interpreter when it asks for the interpreter's lock, and it is freed, with the memory of its
frames (a mapping of 16 KiB each time), when the lock is given back. One request that is never given back keeps it. The states
of threads that have ended, some 20 KiB each, are freed with the process.
"""

from __future__ import annotations

import ctypes
import threading

_kept = threading.local()
_ask_for_state = ctypes.pythonapi.PyGILState_Ensure


def keep_thread_state() -> None:
    """Keep the state of the calling thread from now on."""
    if not hasattr(_kept, "kept"):  # an attribute of a thread lasts as long as its state
        _kept.kept = True
        _ask_for_state()
