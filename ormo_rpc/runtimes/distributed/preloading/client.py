"""The launcher's side of its preloaders."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ormo_rpc.runtimes.distributed.oom_kills import OomKills
from ormo_rpc.runtimes.distributed.preloading import messages
from ormo_rpc.runtimes.distributed.shortages import MEMORY
from ormo_rpc.runtimes.distributed.starter import Command, Process, await_killed, outcome, spawn
from ormo_rpc.runtimes.linux import adopting
from ormo_rpc.signals import blocked

READY_SECONDS = 120.0
"""A preloader has its imports by then; on a busy machine torch takes a while."""
FORK_SECONDS = 5.0
"""A preloader has forked by then."""
LAST_SECONDS = 1.0
"""A process whose connection has ended is gone by then."""
_ROOM = 1500
"""Bytes for the command lines of forks, as `linux.set_title` shows them."""


@dataclass(frozen=True)
class Programs:
    """The modules that the processes of a kind of run are started with.

    Attributes:
        preloader: Of a preloader.
        child: Of a child.
        does: What a child does that was not forked with it, for messages.
        words: In front of the arguments of a child, however it is started.
    """

    preloader: str
    child: str
    does: str
    words: tuple[str, ...] = ()


JOBS = Programs(
    preloader="ormo_rpc.runtimes.programs.preloader",
    child="ormo_rpc.runtimes.programs.entry_point",
    does="loads the job",
)
"""Of runs whose data and model are parts of the configuration."""


class PreloaderLost(Exception):
    """The preloader is gone, or does not answer."""


class ForkedProcess:
    """A child that was forked from a preloader; the part of `subprocess.Popen` that is used.

    Args:
        pid: Its process number.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Look whether it has ended, and return its exit status."""
        if self.returncode is None:
            try:
                number, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # this process ignores SIGCHLD, so nobody knows
                self.returncode = 0
            else:
                self.returncode = os.waitstatus_to_exitcode(status) if number else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end, and return its exit status.

        Raises:
            TimeoutError: it has not ended in time.
        """
        deadline, pause = None if timeout is None else time.monotonic() + timeout, 0.001
        while (status := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"process {self.pid} has not ended in {timeout:g} s")
            time.sleep(pause)
            pause = min(0.05, 2 * pause)
        return status

    def kill(self) -> None:
        """Send it SIGKILL; nothing happens where it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


class Preloader:
    """A preloader; use it as a context, whose end ends it.

    Args:
        process: Its process.
        sock: The connection with it.
        environment: Its environment.
        programs: Of its kind of run.

    Attributes:
        refusal: The reason why it must not be forked, empty where it may be; None before it has its imports.
    """

    def __init__(
        self, process: Process, sock: socket.socket, environment: Mapping[str, str], programs: Programs = JOBS
    ) -> None:
        self.process = process
        self.environment = environment
        self.programs = programs
        self.refusal: str | None = None
        self._sock = sock
        self._oom_kills = OomKills()

    @classmethod
    def spawned(cls, environment: Mapping[str, str], programs: Programs = JOBS) -> Self:
        """Start one, without waiting for its imports."""
        ours, theirs = socket.socketpair()
        # -P: the working directory, which may hold anything, is on the module path only where it is on ours.
        program = (sys.executable, "-P", "-m", programs.preloader, "--room", "." * _ROOM)
        with theirs:
            command = Command(
                name="preloader",
                arguments=program,
                environment=environment,
                output=None,
                descriptors={"--socket-fd": theirs.fileno()},
            )
            try:
                with blocked():  # until it withstands them
                    return cls(spawn(command), ours, environment, programs)
            except BaseException:
                ours.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def kill(self) -> None:
        """Kill it; `close` has yet to be called."""
        self._sock.close()
        self.process.kill()

    def close(self) -> None:
        """End it."""
        self.kill()
        await_killed(self.process)

    def ready(self, timeout_seconds: float = READY_SECONDS) -> bool:
        """Wait until it has its imports; return False where it takes longer.

        Raises:
            PreloaderLost: it has ended.
        """
        if self.refusal is None:
            try:
                self.refusal = str(self._receive(timeout_seconds)["refusal"])
            except (TimeoutError, BlockingIOError):
                return False
            except OSError as error:
                raise PreloaderLost(self._end() or str(error)) from None
        return True

    def ask(self, request: Mapping[str, Any], descriptors: Sequence[int] = (), timeout_seconds: float | None = None) -> Any:
        """Send a request, and return the answer.

        Args:
            request: Of JSON's types.
            descriptors: To go with it.
            timeout_seconds: For the answer; None where it ends with the process or an interruption.

        Raises:
            PreloaderLost: it has ended, or did not answer in time.
        """
        try:
            self.ready()
            self._sock.settimeout(FORK_SECONDS)
            messages.send(self._sock, request, descriptors)
            return self._receive(timeout_seconds)
        except TimeoutError:
            raise PreloaderLost("it does not answer") from None
        except OSError as error:
            raise PreloaderLost(self._end() or str(error)) from None

    def fork(self, command: Command) -> Process:
        """Fork a child.

        Raises:
            OSError: it cannot be forked now.
            PreloaderLost: the preloader has ended, or does not answer.
        """
        given = [] if command.output is None else [command.output]
        request = {
            "name": f"ormo {command.name}",
            "title": [sys.executable, "-P", "-m", self.programs.child, *command.arguments],
            "environment": dict(command.environment),
            "arguments": [*self.programs.words, *command.arguments],
            "options": list(command.descriptors),
            "has_output": bool(given),
        }
        return self._fork(request, [*given, *command.descriptors.values()])

    def fork_preloader(self) -> Preloader:
        """Fork another preloader, which has what this one has.

        Raises:
            OSError: it cannot be forked now.
            PreloaderLost: this one has ended, or does not answer.
        """
        ours, theirs = socket.socketpair()
        request = {
            "name": "ormo job",
            "title": [sys.executable, "-P", "-m", self.programs.preloader, "(with the job)"],
            "environment": dict(self.environment),
            "arguments": None,
            "has_output": False,
        }
        try:
            with theirs:
                return Preloader(self._fork(request, [theirs.fileno()]), ours, self.environment, self.programs)
        except BaseException:
            ours.close()
            raise

    def _fork(self, request: Mapping[str, Any], descriptors: Sequence[int]) -> ForkedProcess:
        here = {"launcher": os.getpid(), "path": module_path(), "directory": _directory()}
        with adopting():  # no longer, as orphans that are not ours would stay zombies of this process
            answer = self.ask({**here, **request}, descriptors, FORK_SECONDS)
        if "errno" in answer:
            raise OSError(answer["errno"], os.strerror(answer["errno"]))
        if "pid" not in answer:
            raise PreloaderLost(str(answer))
        return ForkedProcess(answer["pid"])

    def _receive(self, timeout_seconds: float | None) -> dict[str, Any]:
        self._sock.settimeout(timeout_seconds)
        try:
            answer, descriptors = messages.receive(self._sock)
        except EOFError:
            raise PreloaderLost(self._end() or "it has closed the connection") from None
        messages.close_all(descriptors)
        return answer

    def _end(self) -> str:
        """Describe how it has ended, which it may be about to; empty where it has not."""
        deadline = time.monotonic() + LAST_SECONDS
        while (status := self.process.poll()) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if status is None:
            return ""
        cause = self._oom_kills.cause(1) if status == -signal.SIGKILL else ""
        if cause:
            return f"it was killed {cause}; {MEMORY}"
        return f"it {outcome(status)}"


def _directory() -> str:
    """The current directory; empty where it has been deleted, so that a fork stays where it is."""
    try:
        return str(Path.cwd())
    except FileNotFoundError:
        return ""


def module_path() -> list[str]:
    """The module path of this process, for another one."""
    return [os.path.abspath(each) for each in sys.path]  # noqa: PTH100 - without following links
