"""The supervisor: starts child processes, watches them, and ends all of them, however it ends itself.

Each child has two pipes (`child` is its side of them). A line on its *control pipe* is a message to it; the end of that pipe
means that the supervisor has ended (also by SIGKILL), whereupon the child exits. On its *report pipe* it sends heartbeats and
messages for people; a child that is silent for too long (stopped, or hung) is killed. Children have sessions of their own, so
Ctrl-C reaches the supervisor alone.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ormo_rpc.runtimes.distributed.launcher.child import MAX_EXIT_REASON_CHARACTERS
from ormo_rpc.runtimes.distributed.starter import Command, Process, Starter, await_killed, outcome, pipe, spawn
from ormo_rpc.runtimes.linux import Endings
from ormo_rpc.signals import SignalWatch, blocked

POLL_SECONDS = 0.02
"""The interval at which the supervisor looks at its children, unless one of them ends."""
OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors of opening a log that starting a process would meet as well."""


@dataclass
class ChildProcess:
    """A process that the supervisor has started.

    Attributes:
        name: Its role, for messages.
        process: The process.
        control_fd: The writing end of its control pipe.
        report_fd: The reading end of its report pipe.
        log: The file with its output; None where it writes to the supervisor's.
        timeout_seconds: It is killed when silent for longer, once its first heartbeat has come; None for never.
        start_timeout_seconds: It is killed when its first heartbeat takes longer; None for never.
        joined: As a worker it has been a member of the run.
        oom_cause: Words that tell a death for lack of memory, from the process monitor; empty for any other one.
    """

    name: str
    process: Process
    control_fd: int
    report_fd: int
    log: Path | None
    timeout_seconds: float | None = None
    start_timeout_seconds: float | None = None
    joined: bool = False
    oom_cause: str = ""
    _started_at: float = field(default_factory=time.monotonic)
    _heard_at: float | None = None
    _incomplete: bytes = b""
    """The beginning of a line whose end has not arrived."""
    _silent_seconds: float = 0.0
    """The time-out that it was killed for; 0 where it was not."""
    _exit_reason: str = ""

    @property
    def exit_code(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        return self.process.poll()

    @property
    def running(self) -> bool:
        """True until it has ended."""
        return self.exit_code is None

    def send(self, **message: Any) -> None:
        """Send it a message; nothing happens where it has ended."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self.control_fd, json.dumps(message).encode() + b"\n")

    def receive(self) -> list[str]:
        """Return its messages for people since the last call, and note its heartbeats, its joining and its exit reason."""
        data = b""
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self.report_fd, 65536):
                data += chunk
        if data:
            self._heard_at = time.monotonic()
        *lines, self._incomplete = (self._incomplete + data).split(b"\n")
        reports: list[Any] = []
        for line in filter(None, lines):
            with contextlib.suppress(ValueError):  # a torn line is no reason to end the run
                reports.append(json.loads(line))
        for report in reports:
            if isinstance(report, dict):
                self._exit_reason = str(report.get("exit_reason", ""))
                self.joined |= "joined" in report
        return [report for report in reports if isinstance(report, str)]

    def kill_if_silent(self) -> None:
        """Kill it after a time-out; call `receive` right before, as the supervisor itself may have been stopped."""
        timeout = self.start_timeout_seconds if self._heard_at is None else self.timeout_seconds
        since = self._started_at if self._heard_at is None else self._heard_at
        if timeout is not None and time.monotonic() - since > timeout and self.running and not self._silent_seconds:
            self._silent_seconds = timeout
            self.process.kill()

    @property
    def killed_by_others(self) -> bool:
        """True where SIGKILL has ended it, and not for a time-out."""
        return self.exit_code == -signal.SIGKILL and not self._silent_seconds

    def exit_reason(self) -> str:
        """Describe in one line which process ended how."""
        return f"{self.name} (pid {self.process.pid}) {self.outcome()}{f' (see {self.log})' if self.log else ''}"

    def outcome(self) -> str:
        """Describe how it ended, and why."""
        code = self.exit_code
        assert code is not None, "it has ended"
        words = outcome(code)
        if self._silent_seconds:
            words = f"was killed after {self._silent_seconds:g} s without a heartbeat (stopped, or hung)"
        reason = self._reported_reason()
        cause = f", {self.oom_cause}" if self.oom_cause else ""
        return f"{words}{cause}{f': {reason}' if reason else ''}"

    def _reported_reason(self) -> str:
        """The exit reason that it has sent; without one, the last line of its log if it ended by an error of its own."""
        if self._exit_reason or self.log is None or (self.exit_code or 0) < 0:
            return self._exit_reason[:MAX_EXIT_REASON_CHARACTERS]
        lines: list[str] = []
        with contextlib.suppress(OSError):  # the folder was deleted, or no descriptor is left
            lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1].strip()[:MAX_EXIT_REASON_CHARACTERS] if lines else ""


class Supervisor:
    """Starts children and ends them; use it as a context, whose end leaves no child alive.

    Args:
        report: Called with the messages of children for people.
    """

    def __init__(self, report: Callable[[str], None] = lambda _: None) -> None:
        self.children: list[ChildProcess] = []
        self._endings = Endings()
        self.report = report
        self.watch = SignalWatch()
        self.signals = self.watch.ends
        """The first one asks for an orderly end, a second one ends the wait for it."""

    def __enter__(self) -> Self:
        self.watch.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for child in self.children:
            if child.running:
                child.process.kill()
        for child in list(self.children):
            await_killed(child.process)
            self.reap(child)
        self.watch.__exit__()

    def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        log: Path | None,
        descriptors: Mapping[str, int] | None = None,
        timeout_seconds: float | None = None,
        start_timeout_seconds: float | None = None,
        starter: Starter = spawn,
    ) -> ChildProcess:
        """Start a child; ``--control-fd FD --report-fd FD`` is added to its command.

        Args:
            name: Its role, for messages.
            command: Program and arguments; for a ``starter`` that has a program of its own, the arguments alone.
            env: Its environment.
            log: The file for its output; None for the supervisor's own.
            descriptors: Further file descriptors that it has as well, each with its option, such as ``--listener-fd``.
            timeout_seconds: See `ChildProcess.timeout_seconds`.
            start_timeout_seconds: See `ChildProcess.start_timeout_seconds`.
            starter: Starts it.

        Raises:
            OSError: it cannot be started, such as for want of memory or descriptors.
        """
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as childs:  # a failed start leaves no descriptor
            control_reader, control_writer = pipe(childs, ours)
            report_reader, report_writer = pipe(ours, childs)
            os.set_blocking(report_reader, False)
            os.set_blocking(report_writer, False)  # a child never waits for a supervisor that does not read
            try:
                output = None if log is None else childs.enter_context(log.open("ab"))
            except OSError as error:
                if error.errno in OUT_OF_RESOURCES:
                    raise
                self.report(f"{name}: its log cannot be written: {error}; the run goes on without it")
                output, log = childs.enter_context(Path(os.devnull).open("wb")), None
            childs.enter_context(blocked())
            process = starter(
                Command(
                    name=name,
                    arguments=command,
                    environment=env,
                    output=None if output is None else output.fileno(),
                    descriptors={**(descriptors or {}), "--control-fd": control_reader, "--report-fd": report_writer},
                )
            )
            ours.pop_all()
        child = ChildProcess(name, process, control_writer, report_reader, log, timeout_seconds, start_timeout_seconds)
        self.children.append(child)
        self._endings.add(process.pid)
        return child

    def reap(self, child: ChildProcess) -> None:
        """Read the last reports of a child that has ended, and forget it."""
        self._receive_from(child)
        self._endings.forget(child.process.pid)
        os.close(child.control_fd)
        os.close(child.report_fd)
        self.children.remove(child)

    def wait(self, done: Callable[[], bool], timeout_seconds: float | None = None, *, signals: int = 0) -> bool:
        """Watch the children until ``done()``, a time-out, or more than that many signals.

        Returns:
            True where it is done.
        """
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while not done():
            self._watch_children()
            if len(self.signals) > signals or (deadline is not None and time.monotonic() > deadline):
                return False
            self._endings.wait(POLL_SECONDS)
        return True

    def _watch_children(self) -> None:
        for child in self.children:
            self._receive_from(child)
            child.kill_if_silent()

    def _receive_from(self, child: ChildProcess) -> None:
        for text in child.receive():
            self.report(f"{child.name}: {text}")
