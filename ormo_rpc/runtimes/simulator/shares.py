"""Times of synchronous rounds whose samples are divided by the workers' lasting speeds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from ormo_rpc.worker.heterogeneity import shares_of


class SharedRounds:
    """The part of each worker in a round, in units of a ticket; round r has the tickets r K to r K + K - 1.

    Gradients are computed ticket by ticket all the same: their sum over a round does not depend on who computes which samples,
    but for its rounding where they arrive in another order.

    Args:
        samples: From a ticket to the number of its samples: the last one of an epoch may have fewer.
        total_tickets: T; the last round has those that are left, whose samples all workers divide.
        batch_size: The samples of a ticket.
        slowdowns: The lasting slowdown of each of the K workers.
    """

    def __init__(self, samples: Callable[[int], int], total_tickets: int, batch_size: int, slowdowns: Sequence[float]) -> None:
        self._samples = samples
        self._total = total_tickets
        self._batch_size = batch_size
        self._slowdowns = slowdowns
        self._parts = functools.lru_cache(maxsize=2)(self._divide)

    def tickets(self, iteration: int, worker: int, slowdown: float) -> float:
        """Return what a worker's part of the present round takes, in units of the time of a ticket that nothing slows down.

        In a round of fewer tickets than workers those without one compute, too: whoever has one takes at least as long as they.

        Args:
            iteration: Gradients applied so far, some of the round's own maybe among them.
            worker: The worker.
            slowdown: Its slowdown in this round.
        """
        parts, least = self._parts(iteration // len(self._slowdowns))
        return max(least, slowdown * parts[worker])

    def _divide(self, number: int) -> tuple[Sequence[float], float]:
        """Return the parts of a round, and the time of the slowest one where some worker has no ticket."""
        workers = len(self._slowdowns)
        tickets = range(number * workers, min((number + 1) * workers, self._total))
        shares = shares_of(sum(map(self._samples, tickets)), self._slowdowns)
        parts = [share / self._batch_size for share in shares]
        short = len(tickets) < workers
        return parts, max(part * slow for part, slow in zip(parts, self._slowdowns, strict=True)) if short else 0.0
