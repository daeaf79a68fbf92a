"""The contract of communication schedulers. They never see a gradient, and an algorithm never sees them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ormo_rpc.options import Part


@dataclass(kw_only=True)
class Scheduler(Part, ABC):
    """Decides, after every push, join and leave, which of the blocked workers get their next ticket now.

    The fields of the dataclass are its options; its running state is set by `init` and `start`, which only the server calls.

    Attributes:
        generator: For a scheduler that draws. The server seeds it from the run's seed and saves its state, and `due` is called
            once for each event, so a resumed or replayed run draws the same.
    """

    PATH = "scheduler"

    BARRIER: ClassVar[bool] = False
    """Workers are released in rounds: one that has pushed waits for others to push as well."""
    WHOLE_ROUNDS: ClassVar[bool] = False
    """Its rounds are of all workers, who then have the same parameters."""
    IMMEDIATE: ClassVar[bool] = False
    """`due` always releases every blocked worker at once."""

    @property
    def round_size(self) -> int | None:
        """The number of blocked workers that are released together; None: no fixed number."""
        return None

    def init(self, generator: torch.Generator) -> None:
        """Set the state before any worker is known."""
        self.generator = generator

    @abstractmethod
    def due(self, blocked: Collection[int], holding: Collection[int]) -> list[int]:
        """Return the workers to release now; at least one where some are blocked and nobody holds a ticket.

        Args:
            blocked: Workers that asked for work and are not released yet, in the order of asking.
            holding: Workers that hold a ticket. Those that died, are idle or were told to stop hold none, so no barrier ever
                waits for them.
        """

    def start(self, workers: Collection[int]) -> None:
        """Begin an incarnation of the server with these workers."""

    def join(self, worker: int) -> None:
        """Add a worker."""

    def leave(self, worker: int) -> None:
        """Forget a worker that has left or was evicted."""

    def settle(self, worker: int) -> None:
        """Note that a push of this worker was applied or discarded."""

    def state_dict(self) -> Any:
        """Return what `due` depends on besides the options and the generator, as a private copy of plain values and tensors."""
        return {}

    def load_state_dict(self, state: Any) -> None:
        """Restore what `state_dict` returned."""
