"""The samples of each rank in a round: round r has the tickets r K to r K + K - 1, the last one those that are left.

The learning rate of a round is that of its last ticket, at which a server would make the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ormo_rpc.data import Epochs
from ormo_rpc.worker.heterogeneity import shares_of


@dataclass(frozen=True)
class Part:
    """The part of one rank in a round.

    Attributes:
        number: That of its ticket, which seeds the random draws of its passes.
        indices: The numbers of its samples; none for a rank without a part in the round.
        weight: The weight of its mean gradient in that of the round.
        complete: Every rank has samples in this round.
    """

    number: int
    indices: torch.Tensor
    weight: float
    complete: bool


class Rounds:
    """The rounds of a run.

    Args:
        epochs: The samples of each ticket.
        total_tickets: T.
        size: K, the number of ranks.
        slowdowns: The lasting slowdown of each rank, by whose inverses the samples of a round are divided; None for one ticket
            each.
    """

    def __init__(self, epochs: Epochs, total_tickets: int, size: int, slowdowns: Sequence[float] | None = None) -> None:
        self.size = size
        self.count = -(-total_tickets // size)
        self._epochs = epochs
        self._total = total_tickets
        self._slowdowns = slowdowns

    def tickets(self, number: int) -> range:
        """Return the tickets of a round."""
        return range(number * self.size, min((number + 1) * self.size, self._total))

    def part(self, number: int, rank: int) -> Part:
        """Return the part of a rank in a round."""
        tickets = self.tickets(number)
        ticket = number * self.size + rank
        if self._slowdowns is None:
            mine = ticket in tickets
            indices = self._epochs.indices(ticket) if mine else torch.empty(0, dtype=torch.int64)
            return Part(ticket, indices, 1 / len(tickets) if mine else 0.0, len(tickets) == self.size)
        samples = torch.cat([self._epochs.indices(each) for each in tickets])
        sizes = shares_of(len(samples), self._slowdowns)
        start = sum(sizes[:rank])
        return Part(ticket, samples[start : start + sizes[rank]], sizes[rank] / len(samples), all(sizes))
