"""Communication schedulers: who is answered when. They never see a gradient, and an algorithm never sees them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ormo_rpc.options import Section, option


class Scheduler(ABC):
    """Decides, after every push, join and leave, which of the waiting workers get their next ticket now."""

    NAME: ClassVar[str]

    BARRIER: ClassVar[bool] = False
    """Whether workers wait for one another after every ticket."""

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

    def start(self, workers: Collection[int]) -> None:
        """A life of the server begins with these workers."""

    def join(self, worker: int) -> None:
        """A worker comes."""

    def leave(self, worker: int) -> None:
        """A worker is gone."""

    def settle(self, worker: int) -> None:
        """A worker's push has been dealt with."""

    def state_dict(self) -> dict[int, int]:
        """What the scheduler remembers, for each worker, as a private copy."""
        return {}

    def load_state_dict(self, state: Mapping[int, int]) -> None:
        """Take over what `state_dict` returned."""


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
    BARRIER = True

    @dataclass(frozen=True, kw_only=True)
    class Options(Scheduler.Options):
        """No options of its own."""

        name: str = option("sync", "all are answered when all who hold a ticket wait (with ormo: SSGDm)")

    def due(self, waiting: Collection[int], holding: Collection[int]) -> list[int]:
        """All who wait, once nobody holds a ticket."""
        return [] if holding else list(waiting)


class Partial(Scheduler):
    """Answers as soon as k workers wait, or nobody is left to wait for."""

    NAME = "partial"
    BARRIER = True

    @dataclass(frozen=True, kw_only=True)
    class Options(Scheduler.Options):
        """How many."""

        name: str = option("partial", "workers are answered together, as soon as k of them wait")
        k: int = option(2, "how many workers are answered together", valid=lambda v: v >= 1, expected="a whole number >= 1")

    def due(self, waiting: Collection[int], holding: Collection[int]) -> list[int]:
        """All who wait, once they are k or nobody holds a ticket."""
        return list(waiting) if len(waiting) >= self.options.k or not holding else []


class SSP(Scheduler):
    """Stale synchronous parallel: holds a worker that is more than s of its own tickets ahead of the slowest one.

    A worker's clock counts the pushes that were dealt with; one that joins starts at the lowest clock. Who neither holds a
    ticket nor waits is not waited for. Source: Ho et al. 2013 (NIPS 26).
    """

    NAME = "ssp"

    @dataclass(frozen=True, kw_only=True)
    class Options(Scheduler.Options):
        """The slack."""

        name: str = option("ssp", "stale synchronous parallel: a worker waits while more than s tickets ahead of the slowest")
        s: int = option(3, "tickets that a worker may be ahead", valid=lambda v: v >= 0, expected="a whole number >= 0")

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.clocks: dict[int, int] = {}

    def due(self, waiting: Collection[int], holding: Collection[int]) -> list[int]:
        """Those of the waiting who are not more than s ahead."""
        slowest = min((self.clocks[worker] for worker in (*waiting, *holding)), default=0)
        return [worker for worker in waiting if self.clocks[worker] - slowest <= self.options.s]

    def start(self, workers: Collection[int]) -> None:
        """All clocks at zero."""
        self.clocks = dict.fromkeys(workers, 0)

    def join(self, worker: int) -> None:
        """Its clock starts at the lowest one."""
        self.clocks[worker] = min(self.clocks.values(), default=0)

    def leave(self, worker: int) -> None:
        """Its clock is gone."""
        del self.clocks[worker]

    def settle(self, worker: int) -> None:
        """Its clock ticks."""
        self.clocks[worker] += 1

    def state_dict(self) -> dict[int, int]:
        """The clocks."""
        return dict(self.clocks)

    def load_state_dict(self, state: Mapping[int, int]) -> None:
        """Take over the clocks."""
        self.clocks = dict(state)


SCHEDULERS: dict[str, type[Scheduler]] = {scheduler.NAME: scheduler for scheduler in (Async, Sync, Partial, SSP)}
"""The schedulers by name."""


def find(name: str) -> type[Scheduler]:
    """The scheduler of a name.

    Raises:
        ValueError: when there is none.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler: got {name!r}, expected one of {', '.join(SCHEDULERS)}")
    return SCHEDULERS[name]
