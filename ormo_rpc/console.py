"""Standard output and standard error: what cannot be written there never decides the fate of a run, nor its exit status.

The reader of a pipe may go away, a terminal be closed, a disk be full (EPIPE, EIO, ENOSPC). A line that is lost so is kept in
the log of the run directory, where there is one.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO, cast

FAULTS = (OSError, ValueError)
"""Raised by a stream that cannot be written; `ValueError` by one that is closed, or that lacks a character."""
_unsaid_log: Path | None = None
_command = "launch.py"
"""In front of what a launcher reports."""


class BestEffort:
    """A text stream without faults of writing; all else is the stream's own. A line reaches it at once.

    Args:
        stream: The stream.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._line = ""
        """Text since the last end of a line."""
        self._failed = False
        """Some of it could not be written."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text as far as that is possible; return its length."""
        failed = False
        try:
            self._stream.write(text)
            if "\n" in text:
                self._stream.flush()
        except FAULTS:
            failed = self._failed = True
        *lines, self._line = (self._line + text).split("\n")
        self._line = _last_state(self._line)
        if lines:
            if self._failed:
                _keep(filter(None, map(_last_state, lines)))
            self._failed = failed and bool(self._line)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hand everything written to the operating system as far as that is possible."""
        with contextlib.suppress(*FAULTS):
            self._stream.flush()

    def close(self) -> None:
        """Close the stream."""
        with contextlib.suppress(*FAULTS):
            self._stream.close()


def best_effort(stream: TextIO) -> TextIO:
    """Make a stream `BestEffort`, unless it is."""
    return stream if isinstance(stream, BestEffort) else cast("TextIO", BestEffort(stream))


def install() -> None:
    """Make standard output and standard error of this process `BestEffort`, for whatever writes there and to its end.

    Only for a process of our own: those of a program that calls this package stay as they are.
    """
    sys.stdout, sys.stderr = (
        best_effort(stream or Path(os.devnull).open("w"))  # noqa: SIM115 - open to the end of the process
        for stream in (sys.stdout, sys.stderr)
    )


def say(line: str) -> None:
    """Print a line on standard error."""
    if _standard_error() is not None:
        print(line, file=best_effort(sys.stderr), flush=True)


def name_command(name: str) -> None:
    """Let what is reported begin with another name than that of ``launch.py``."""
    global _command
    _command = name


def report(text: str) -> None:
    """Print a line of a launcher on standard error."""
    say(f"{_command}: {text}")


def on_terminal() -> bool:
    """Tell if standard error is a terminal."""
    stream = _standard_error()
    with contextlib.suppress(*FAULTS):
        return stream is not None and stream.isatty()
    return False


def keep_unsaid(log: Path) -> None:
    """Append to this file the lines that cannot be written from now on; its folder is made where a line comes."""
    global _unsaid_log
    _unsaid_log = log


def _last_state(line: str) -> str:
    """The end of a line that a progress bar writes again and again."""
    return line.rpartition("\r")[2]


def _keep(lines: Iterable[str]) -> None:
    if _unsaid_log is not None:
        with contextlib.suppress(OSError):
            _unsaid_log.parent.mkdir(exist_ok=True)
            with _unsaid_log.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n" for line in lines)


def _standard_error() -> TextIO | None:
    """The stream; None in a process that was started without."""
    return sys.stderr
