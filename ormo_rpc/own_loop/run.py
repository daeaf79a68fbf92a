"""A run as `join` has it, and its directory."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from ormo_rpc import console
from ormo_rpc.config.schema import Config
from ormo_rpc.messages import Push, Reply
from ormo_rpc.own_loop.evaluation import OwnFunction
from ormo_rpc.own_loop.job import OwnJob, OwnModel
from ormo_rpc.own_loop.roles import Role
from ormo_rpc.own_loop.worker import OwnWorker


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as `join` has it.

    Attributes:
        role: The part of this process.
        model: The script's model.
        lr: The script's learning rate; None for that of the configuration.
        evaluate: The script's evaluation; None where there is none.
        run_dir: The run directory, as the script has it.
        words: The overrides that were typed.
        began: Time at which the run began, on the monotonic clock.
    """

    role: Role
    model: OwnModel
    lr: Callable[[int], float] | None
    evaluate: OwnFunction | None
    run_dir: Path | None
    words: Sequence[str]
    began: float

    def job(self, config: Config, *, trains_here: bool = False) -> OwnJob:
        """Make the job of a configuration, such as the server's."""
        return OwnJob(config, self.model, lr=self.lr, evaluate=self.evaluate, trains_here=trains_here)

    def directory(self) -> Path:
        """Return the run directory, by default a new one."""
        given = self.run_dir or Path("outputs") / datetime.now().strftime("%Y-%m-%d/%H-%M-%S-%f")
        return given.expanduser().absolute()


def say(text: str) -> None:
    """Print a line of this package on standard error of the script's process."""
    console.say(f"ormo_rpc: {text}")


class Source(Protocol):
    """Gives the replies that the loop works for.

    Attributes:
        summary: The summary of the run, once it has ended, where this process has it.
    """

    summary: dict[str, Any] | None

    @property
    def worker(self) -> OwnWorker:
        """The worker that the newest reply is for."""
        ...

    def replies(self) -> Generator[Reply, Push]:
        """Yield the replies with a ticket; each is answered by sending a push, which brings the next one."""
        ...

    def before_push(self, seconds: float) -> None:
        """Note that a push is about to be sent, for a ticket that took this much processor time."""
        ...
