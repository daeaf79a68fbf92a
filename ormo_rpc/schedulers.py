"""Communication schedulers: who is answered when. They never see a gradient, and a rule never sees them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

from ormo_rpc.options import Section, option


class Scheduler(ABC):
    """Decides, after every push, join and leave, which of the waiting workers get their next ticket now."""

    NAME: ClassVar[str]

    @dataclass(frozen=True, kw_only=True)
    class Options(Section):
        """Options that every scheduler has: its name."""

        PATH = "scheduler"
        name: str = option("???", "who is answered when")

    def __init__(self, options: Any) -> None:
        self.options = options

    @abstractmethod
    def due(self, waiting: Collection[int], holding: Collection[int]) -> list[int]:
        """The workers to answer now.

        Args:
            waiting: Workers that asked for work and have no answer yet, in the order of asking.
            holding: Workers that hold a ticket. The dead, the parked and those that were told to stop hold none, so no
                barrier ever waits for them.
        """


class Async(Scheduler):
    """Answers at once."""

    NAME = "async"

    @dataclass(frozen=True, kw_only=True)
    class Options(Scheduler.Options):
        """No options of its own."""

        name: str = option("async", "every worker is answered at once")

    def due(self, waiting: Collection[int], holding: Collection[int]) -> list[int]:  # noqa: ARG002 - nobody is waited for
        """All who wait."""
        return list(waiting)


class Sync(Scheduler):
    """Answers all when all who hold a ticket have pushed: rounds, as in synchronous data-parallel SGD."""

    NAME = "sync"

    @dataclass(frozen=True, kw_only=True)
    class Options(Scheduler.Options):
        """No options of its own."""

        name: str = option("sync", "all are answered when all who hold a ticket wait (with ormo: SSGDm)")

    def due(self, waiting: Collection[int], holding: Collection[int]) -> list[int]:
        """All who wait, once nobody holds a ticket."""
        return [] if holding else list(waiting)


SCHEDULERS: dict[str, type[Scheduler]] = {scheduler.NAME: scheduler for scheduler in (Async, Sync)}
"""The schedulers by name."""


def find(name: str) -> type[Scheduler]:
    """The scheduler of a name.

    Raises:
        ValueError: when there is none.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler: got {name!r}, expected one of {', '.join(SCHEDULERS)}")
    return SCHEDULERS[name]
