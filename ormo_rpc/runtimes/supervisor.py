"""The supervisor: starts child processes, watches them, and takes all of them with it when it ends, however it ends.

Each child holds the reading end of a *control pipe* of its own. A line on it is a message; its end means that the supervisor
is gone (also by SIGKILL), whereupon the child ends itself. Children live in sessions of their own, so Ctrl-C reaches the
supervisor alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

POLL_SECONDS = 0.02
"""How often the supervisor looks at its children."""
DONE = 64
"""The exit status of a child that has done its work."""
LAST_WORDS = 300
"""How many characters of a child's last line are told; the log has all of it."""
KILL_SECONDS = 5.0
"""How long a child that is killed may take to disappear."""


PR_SET_PDEATHSIG = 1
_prctl: Callable[..., int] | None = ctypes.CDLL(None).prctl if sys.platform.startswith("linux") else None


def _die_with_parent() -> None:
    """In a child of Linux, before anything else: be killed when the parent is, even while stopped or still importing."""
    if _prctl is not None:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass
class Child:
    """A process that the supervisor started.

    Attributes:
        name: What it is, for messages.
        process: The process.
        control: The writing end of its control pipe.
        log: Where its output goes; None where it goes to ours.
    """

    name: str
    process: subprocess.Popen[bytes]
    control: int
    log: Path | None

    @property
    def exit_code(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        return self.process.poll()

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self.exit_code is None

    @property
    def failed(self) -> bool:
        """Whether it has ended, but not by `DONE`: a status of 0 may come from anybody's ``sys.exit``."""
        return self.exit_code not in (None, DONE)

    def tell(self, **message: Any) -> None:
        """Send it a message; one that is gone hears nothing."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self.control, json.dumps(message).encode() + b"\n")

    def obituary(self) -> str:
        """One line that says how it ended."""
        code = self.process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
        last = self._last_words()
        return (
            f"{self.name} (pid {self.process.pid}) {how}{f': {last}' if last else ''}{f' (see {self.log})' if self.log else ''}"
        )

    def _last_words(self) -> str:
        """The last line of its log, if it ended by an error of its own."""
        if self.log is None or self.process.returncode < 0:
            return ""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1].strip()[:LAST_WORDS] if lines else ""


class Supervisor:
    """Starts children and ends them; use it as a context, whose end leaves no child alive."""

    def __init__(self) -> None:
        self.children: list[Child] = []
        self.signals: list[signal.Signals] = []
        """The signals that asked to end, in order; the first asks, one more insists."""
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        # Signals can be handled in the main thread only; elsewhere they stay the business of whoever runs it.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._interrupt)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for child in self.children:
            if child.running:
                child.process.kill()
        for child in self.children:
            child.process.wait(KILL_SECONDS)
            os.close(child.control)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def start(
        self, name: str, command: Sequence[str], *, env: Mapping[str, str], log: Path | None, pass_fds: Sequence[int] = ()
    ) -> Child:
        """Start a child; ``--control FD`` is added to its command.

        Args:
            name: What it is, for messages.
            command: Program and arguments.
            env: Its environment.
            log: The file for its output; None for ours.
            pass_fds: File descriptors that it inherits.
        """
        reading, writing = os.pipe()
        output = contextlib.nullcontext() if log is None else log.open("ab")
        try:
            with output as stream:
                process = subprocess.Popen(
                    [*command, "--control", str(reading)],
                    env=dict(env),
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=stream,
                    pass_fds=[*pass_fds, reading],
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                )
        except BaseException:
            os.close(writing)
            raise
        finally:
            os.close(reading)
        child = Child(name, process, writing, log)
        self.children.append(child)
        return child

    def wait(self, done: Callable[[], bool], timeout_seconds: float | None = None, *, signals: int = 0) -> bool:
        """Wait until ``done()``, more than so many signals, or the time-out; return whether it is done."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while not done():
            if len(self.signals) > signals or (deadline is not None and time.monotonic() > deadline):
                return False
            time.sleep(POLL_SECONDS)
        return True

    def _interrupt(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the signature of a signal handler
        self.signals.append(signal.Signals(number))


def listen_to_supervisor(control: int, on_message: Callable[[dict[str, Any]], None]) -> None:
    """In a child: hear the supervisor's messages in a thread, and end this process at once when the supervisor is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def listen() -> None:
        try:
            with os.fdopen(control) as pipe:
                for line in pipe:
                    on_message(json.loads(line))
        finally:  # whatever went wrong: a process that nobody can end must not go on
            os._exit(1)

    threading.Thread(target=listen, name="control", daemon=True).start()
