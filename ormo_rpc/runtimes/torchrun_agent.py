"""The agent of torchrun that has started this rank, and starts it again: who it is, and the end of a rank that outlives it."""

from __future__ import annotations

import functools
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from ormo_rpc import console
from ormo_rpc.runtimes.linux import stat_fields

POLL_SECONDS = 0.5
"""The interval at which a rank looks after its agent."""
_MARK = b"TORCHELASTIC_RUN_ID="
"""A variable that the agent gives to its ranks, and has not itself."""
_ENDED = ("Z", "X")
"""States of a process that has ended, in Linux's table of processes."""


@dataclass(frozen=True)
class Agent:
    """A process: a number, and its start in ticks since the machine's, since numbers are used again."""

    pid: int
    started: str

    @classmethod
    def of_this_rank(cls) -> Agent | None:
        """Find the nearest ancestor that is no part of the rank, such as a shell between them; None where it is not told."""
        pid = os.getppid()
        try:
            while pid > 1 and any(each.startswith(_MARK) for each in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")):
                pid = int(stat_fields(pid)[1])
            return cls(pid, stat_fields(pid)[19])
        except (OSError, IndexError):  # it has ended, belongs to somebody else, or this is not Linux
            return None

    @property
    def name(self) -> str:
        """A name of it among all machines."""
        return f"{socket.gethostname()} {self.pid} {self.started}"

    @property
    def alive(self) -> bool:
        """False once it has ended."""
        try:
            fields = stat_fields(self.pid)
        except OSError:
            return False
        return fields[19] == self.started and fields[0] not in _ENDED


@functools.cache
def end_with_agent() -> None:
    """Ask this process to end in order, by SIGTERM, once its agent has ended by whatever means; nobody would end it then."""
    agent = Agent.of_this_rank()
    if agent is not None:
        threading.Thread(target=_watch, args=(agent,), name="torchrun's agent", daemon=True).start()


def _watch(agent: Agent) -> None:
    while agent.alive:
        time.sleep(POLL_SECONDS)
    console.report(f"torchrun's agent (pid {agent.pid}) has ended, so this rank ends as well")
    os.kill(os.getpid(), signal.SIGTERM)
