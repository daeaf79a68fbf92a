"""Ways to start a child: a program of its own, or (see `preloading`) a process that is forked from a preloader."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from signal import Signals
from typing import Protocol

from ormo_rpc.runtimes.linux import die_with_parent

KILLED_SECONDS = 5.0
"""A process that was killed has ended by then, unless it is a large one on a busy machine."""


def pipe(reader: contextlib.ExitStack, writer: contextlib.ExitStack) -> tuple[int, int]:
    """Make a pipe, each end of which its owner closes."""
    ends = os.pipe()
    for end, owner in zip(ends, (reader, writer), strict=True):
        owner.callback(os.close, end)
    return ends


@dataclass(frozen=True, kw_only=True)
class Command:
    """The process to start.

    Attributes:
        name: Its role, for people.
        arguments: Its arguments; with the program in front, where a program is started.
        environment: Its environment.
        output: A file descriptor for its output; None for this process's own.
        descriptors: Descriptors of this process that it has as well, each with the option that tells it the number.
    """

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str]
    output: int | None
    descriptors: Mapping[str, int]


class Process(Protocol):
    """A child of this process, as `subprocess.Popen` has it."""

    pid: int

    @property
    def returncode(self) -> int | None:
        """Its exit status, negative for a signal, at the last look; None before the end."""
        ...

    def poll(self) -> int | None:
        """Look whether it has ended, and return its exit status."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end, and return its exit status.

        Raises:
            TimeoutError, subprocess.TimeoutExpired: it has not ended in time.
        """
        ...

    def kill(self) -> None:
        """Send it SIGKILL; nothing happens where it has ended."""
        ...


def outcome(exit_status: int) -> str:
    """Describe how a process has ended: "was killed by SIGKILL", or "exited with status 1"."""
    if exit_status >= 0:
        return f"exited with status {exit_status}"
    known = -exit_status in [*Signals]  # those of real time have numbers alone
    return f"was killed by {Signals(-exit_status).name if known else f'signal {-exit_status}'}"


def await_killed(process: Process) -> None:
    """Wait for the end of a process that was killed; one that takes longer than `KILLED_SECONDS` ends by itself."""
    with contextlib.suppress(TimeoutError, subprocess.TimeoutExpired):
        process.wait(KILLED_SECONDS)


class Starter(Protocol):
    """A way to start a child."""

    def __call__(self, command: Command) -> Process:
        """Start it.

        Raises:
            OSError: it cannot be started now, such as for want of memory or descriptors.
        """
        ...


def spawn(command: Command) -> Process:
    """Start a program, in a session of its own and with no input.

    Raises:
        OSError: it cannot be started.
    """
    numbers = [word for option, number in command.descriptors.items() for word in (option, str(number))]
    return subprocess.Popen(
        [*command.arguments, *numbers],
        env=dict(command.environment),
        stdin=subprocess.DEVNULL,
        stdout=command.output,
        stderr=command.output,
        pass_fds=list(command.descriptors.values()),
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
