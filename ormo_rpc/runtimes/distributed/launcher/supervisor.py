"""The supervisor: starts child processes, watches them, and takes all of them with it when it ends, however it ends.

Each child holds two pipes of its own. A line on its *control pipe* is a message of the supervisor's; its end means that the
supervisor is gone (also by SIGKILL), whereupon the child ends itself. On its *report pipe* the child tells that it lives, again
and again, and what people should read; one that falls silent (stopped, or hung) is killed. Children live in sessions of their
own, so Ctrl-C reaches the supervisor alone.
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
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

POLL_SECONDS = 0.02
"""How often the supervisor looks at its children."""
DONE = 64
"""The exit status of a child that has done its work."""
EXIT_NO_RESTART = 65
"""The exit status of a child that is not wanted any more; another one in its place would not be either."""
LAST_WORDS = 300
"""How many characters of a child's last line are told; the log has all of it."""
SAID = 600
"""How many characters of a report are told; escaped as JSON they fit into one write to a pipe that nothing can divide."""
KILL_SECONDS = 5.0
"""How long a child that is killed may take to disappear."""
_PR_SET_PDEATHSIG = 1
"""Linux: prctl(2) asks for a signal at the death of the parent."""
_prctl: Callable[..., int] | None = ctypes.CDLL(None).prctl if sys.platform.startswith("linux") else None


def _die_with_parent() -> None:
    """In a child of Linux, before anything else: be killed when the parent is, even while stopped or still importing."""
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass
class Child:
    """A process that the supervisor started.

    Attributes:
        name: What it is, for messages.
        process: The process.
        control: The writing end of its control pipe.
        report: The reading end of its report pipe.
        log: Where its output goes; None where it goes to ours.
        patience_seconds: How long it may be silent, once it has been heard; None for ever.
        start_patience_seconds: How long it may take to be heard for the first time; None for ever.
    """

    name: str
    process: subprocess.Popen[bytes]
    control: int
    report: int
    log: Path | None
    patience_seconds: float | None = None
    start_patience_seconds: float | None = None
    _began: float = field(default_factory=time.monotonic)
    _heard: float | None = None
    _unfinished: bytes = b""
    _silent: float = 0.0
    """For how long it was silent when it was killed for that."""
    _farewell: str = ""

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

    def hear(self) -> list[str]:
        """What it has reported since the last call; a beat of its pulse says nothing, but that it lives."""
        said = b""
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self.report, 65536):
                said += chunk
        if said:
            self._heard = time.monotonic()
        *lines, self._unfinished = (self._unfinished + said).split(b"\n")
        heard: list[Any] = []
        for line in filter(None, lines):
            with contextlib.suppress(ValueError):  # torn, by whatever: it is no reason to end the run
                heard.append(json.loads(line))
        for farewell in (each for each in heard if isinstance(each, dict)):
            self._farewell = farewell["last"]
        return [each for each in heard if isinstance(each, str)]

    def kill_if_silent(self) -> None:
        """End it if it has not been heard for too long; call `hear` before, as we may have been stopped ourselves."""
        patience = self.start_patience_seconds if self._heard is None else self.patience_seconds
        since = self._began if self._heard is None else self._heard
        if patience is not None and time.monotonic() - since > patience and self.running and not self._silent:
            self._silent = patience
            self.process.kill()

    def exit_reason(self) -> str:
        """One line that says how it ended."""
        code = self.process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
        if self._silent:
            how = f"was silent for {self._silent:g} s (stopped, or hung) and was killed"
        last = self._last_words()
        return (
            f"{self.name} (pid {self.process.pid}) {how}{f': {last}' if last else ''}{f' (see {self.log})' if self.log else ''}"
        )

    def _last_words(self) -> str:
        """What it said last, or the last line of its log, if it ended by an error of its own."""
        if self._farewell or self.log is None or self.process.returncode < 0:
            return self._farewell[:LAST_WORDS]
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1].strip()[:LAST_WORDS] if lines else ""


class Supervisor:
    """Starts children and ends them; use it as a context, whose end leaves no child alive.

    Args:
        tell: Called with what children report for people to read.
    """

    def __init__(self, tell: Callable[[str], None] = lambda _: None) -> None:
        self.children: list[Child] = []
        self.tell = tell
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
        for child in list(self.children):
            child.process.wait(KILL_SECONDS)
            self.reap(child)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def reap(self, child: Child) -> None:
        """Forget a child that has ended, after its last words."""
        self._listen_to(child)
        os.close(child.control)
        os.close(child.report)
        self.children.remove(child)

    def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        log: Path | None,
        pass_fds: Sequence[int] = (),
        patience_seconds: float | None = None,
        start_patience_seconds: float | None = None,
    ) -> Child:
        """Start a child; ``--control FD --report FD`` is added to its command.

        Args:
            name: What it is, for messages.
            command: Program and arguments.
            env: Its environment.
            log: The file for its output; None for ours.
            pass_fds: File descriptors that it inherits.
            patience_seconds: How long it may be silent after its first report before it is killed; None for ever.
            start_patience_seconds: How long its first report may take; None for ever.
        """
        (reading, writing), (report, reporting) = os.pipe(), os.pipe()
        os.set_blocking(report, False)
        os.set_blocking(reporting, False)  # a child never waits for a supervisor that does not listen
        output = contextlib.nullcontext() if log is None else log.open("ab")
        try:
            with output as stream:
                process = subprocess.Popen(
                    [*command, "--control", str(reading), "--report", str(reporting)],
                    env=dict(env),
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=stream,
                    pass_fds=[*pass_fds, reading, reporting],
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                )
        except BaseException:
            os.close(writing)
            os.close(report)
            raise
        finally:
            os.close(reading)
            os.close(reporting)
        child = Child(name, process, writing, report, log, patience_seconds, start_patience_seconds)
        self.children.append(child)
        return child

    def wait(self, done: Callable[[], bool], timeout_seconds: float | None = None, *, signals: int = 0) -> bool:
        """Wait until ``done()``, more than so many signals, or the time-out; return whether it is done."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while not done():
            self._look_after_children()
            if len(self.signals) > signals or (deadline is not None and time.monotonic() > deadline):
                return False
            time.sleep(POLL_SECONDS)
        return True

    def _look_after_children(self) -> None:
        for child in self.children:
            self._listen_to(child)
            child.kill_if_silent()

    def _listen_to(self, child: Child) -> None:
        for text in child.hear():
            self.tell(f"{child.name}: {text}")

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


class Report:
    """In a child: the writing end of its report pipe.

    Args:
        descriptor: Of the pipe.
        beat_seconds: How often it tells that it lives.
    """

    def __init__(self, descriptor: int, beat_seconds: float) -> None:
        self._descriptor = descriptor
        self._beat_seconds = beat_seconds
        threading.Thread(target=self._beat, name="pulse", daemon=True).start()

    def say(self, text: str) -> None:
        """Tell people something; when this returns, not even a SIGKILL of ours takes it back."""
        self._write(json.dumps(text[:SAID]).encode() + b"\n")

    def last_words(self, text: str) -> None:
        """Tell why this process is about to end."""
        self._write(json.dumps({"last": text[:LAST_WORDS]}).encode() + b"\n")

    def _beat(self) -> None:
        while True:
            self._write(b"\n")
            time.sleep(self._beat_seconds)

    def _write(self, line: bytes) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):  # nobody listens at present: it is no one's loss
            os.write(self._descriptor, line)
