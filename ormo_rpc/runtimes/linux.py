"""Interfaces of Linux to its processes; elsewhere nothing happens, or there is no answer."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Generator
from pathlib import Path

LINUX = sys.platform.startswith("linux")
MAX_NAME_BYTES = 15
"""Of a process's name in ``ps`` and ``top``."""
_SET_PDEATHSIG, _SET_NAME, _SET_SUBREAPER, _GET_SUBREAPER = 1, 15, 36, 37
"""Of prctl(2)."""
_prctl: Callable[..., int] | None = ctypes.CDLL(None).prctl if LINUX else None
_reapers = threading.Lock()
"""Guards `_reaping`."""
_reaping = [0]
"""Contexts of `adopting` that are open in this process."""


def stat_fields(process: int | str = "self") -> list[str]:
    """The fields of a process in Linux's table, from the third one on: its state, the number of its parent, and more.

    Raises:
        OSError: there is no such process, or this is not Linux.
    """
    # The second one is the name of the program, in parentheses, which may hold anything.
    return Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()


def die_with_parent() -> None:
    """Be killed together with the parent, even while stopped or still importing."""
    if _prctl is not None:
        _prctl(_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def adopting() -> Generator[None]:
    """Become the parent of descendants whose own parent ends, until the context does."""
    if _prctl is None:
        yield
        return
    former = ctypes.c_int()
    with _reapers:
        _prctl(_GET_SUBREAPER, ctypes.byref(former))
        outermost = _reaping[0] == 0 and not former.value
        _reaping[0] += 1
        if outermost:
            _prctl(_SET_SUBREAPER, 1)
    try:
        yield
    finally:
        with _reapers:
            _reaping[0] -= 1
            if _reaping[0] == 0 and outermost:
                _prctl(_SET_SUBREAPER, 0)


class Endings:
    """Tells that one of several children has ended, at that moment; use it in one thread.

    Without pidfd_open(2) a wait takes all of its time.
    """

    def __init__(self) -> None:
        self._poll = select.poll()
        self._pids: dict[int, int] = {}
        """Process numbers by descriptor, of children that may be running."""

    def add(self, pid: int) -> None:
        """Look after a child that has not been waited for."""
        with contextlib.suppress(OSError, AttributeError):  # not Linux, an old one, or no descriptor is left
            descriptor = os.pidfd_open(pid)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType, reportUnknownMemberType] # on Linux alone
            self._pids[descriptor] = pid
            self._poll.register(descriptor, select.POLLIN)

    def forget(self, pid: int) -> None:
        """Look after a child no more."""
        for descriptor in [descriptor for descriptor, each in self._pids.items() if each == pid]:
            del self._pids[descriptor]
            self._poll.unregister(descriptor)
            os.close(descriptor)

    def wait(self, seconds: float) -> None:
        """Wait until a further child has ended, for this time at most."""
        for descriptor, _ in self._poll.poll(1000 * seconds):
            self.forget(self._pids[descriptor])


def set_title(name: str, words: list[str]) -> None:
    """Show another name and other arguments in ``ps`` and ``top``, as far as there is room where the present ones lie.

    Args:
        name: Cut to `MAX_NAME_BYTES`.
        words: In place of the arguments, the program included.
    """
    if _prctl is None:
        return
    _prctl(_SET_NAME, name.encode()[:MAX_NAME_BYTES], 0, 0, 0)
    with contextlib.suppress(OSError, ValueError, IndexError):  # a title is worth no failure
        begin, end = (int(field) for field in stat_fields()[45:47])  # the addresses between which the arguments lie
        room = end - begin - 2
        if begin > 0 and room > 0:
            title = " ".join(words).encode()[:room].ljust(room + 1, b"\0")
            ctypes.memmove(begin, title + b"\1", room + 2)  # a last byte that is not 0 tells the system of a title
