"""The child's side of its two pipes: the control pipe, which it obeys, and the report pipe, which carries its heartbeats.

`supervisor` is the other side. Each message is one line of JSON. On the report pipe an empty line is a heartbeat, a string is a
message for people, ``{"exit_reason": ...}`` the reason why the process is about to end, and ``{"joined": true}`` tells that a
worker has become a member of the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any

EXIT_DONE = 64
"""The exit status of a child whose work is done. A status of 0 may come from any ``sys.exit``."""
EXIT_NO_RESTART = 65
"""The exit status of a child that was banned or refused, as a replacement would be."""
EXIT_SERVER_LOST = 66
"""The exit status of a worker that has not reached the server for ``runtime.start_timeout_seconds``."""
MAX_EXIT_REASON_CHARACTERS = 300
"""A longer reason is cut; the log has all of it."""
MAX_MESSAGE_CHARACTERS = 600
"""A longer message is cut: escaped as JSON it fits into one atomic write to a pipe."""


def obey_supervisor(control_fd: int, on_message: Callable[[dict[str, Any]], None]) -> None:
    """Handle the messages of the control pipe in a thread, and end this process at once when the pipe ends.

    The pipe ends with the supervisor, also by SIGKILL.

    Args:
        control_fd: The reading end.
        on_message: Called with each message.
    """

    def listen() -> None:
        try:
            with os.fdopen(control_fd) as pipe:
                for line in pipe:
                    on_message(json.loads(line))
        finally:  # after any failure: a process that cannot be stopped must not run
            os._exit(1)

    threading.Thread(target=listen, name="control", daemon=True).start()


class Reporter:
    """The writing end of the report pipe; sends heartbeats from a thread of its own.

    Args:
        report_fd: The writing end, which does not block.
        heartbeat_seconds: The interval of the heartbeats.
    """

    def __init__(self, report_fd: int, heartbeat_seconds: float) -> None:
        self._report_fd = report_fd
        self._heartbeat_seconds = heartbeat_seconds
        threading.Thread(target=self._send_heartbeats, name="heartbeat", daemon=True).start()

    def report(self, text: str) -> None:
        """Send a message for people. It is in the pipe when this returns, so a SIGKILL right after it loses nothing."""
        self._write(json.dumps(text[:MAX_MESSAGE_CHARACTERS]).encode() + b"\n")

    def exit_reason(self, text: str) -> None:
        """Report the reason why this process is about to end."""
        self._write(json.dumps({"exit_reason": text[:MAX_EXIT_REASON_CHARACTERS]}).encode() + b"\n")

    def joined(self) -> None:
        """Report that this worker has joined the run."""
        self._write(json.dumps({"joined": True}).encode() + b"\n")

    def _send_heartbeats(self) -> None:
        while True:
            self._write(b"\n")
            time.sleep(self._heartbeat_seconds)

    def _write(self, line: bytes) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):  # the supervisor does not read at present, or has ended
            os.write(self._report_fd, line)
