"""The rules by which the buffers that pushes report enter the server's."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class RuleKind(Enum):
    """The way in which what a push reports of a buffer enters the server's."""

    average = "average"
    """Running statistics of a batch norm: averaged with the statistics of its calls."""
    count = "count"
    """The number of calls of a batch norm: those of the push are added."""
    newest = "newest"
    """Anything else that a forward pass may write: the newest push's value replaces it."""


@dataclass(frozen=True, slots=True)
class Rule:
    """The rule of one buffer.

    A push reports for an average the mean ``B`` of the statistics of the norm's n calls for its ticket, weighted as the norm
    weights them, and the server does what the norm would have done: ``r <- (1 - W) r + W B`` with ``W = 1 - (1 - m)^n``, or
    ``W = n / (N + n)`` where the norm averages over all of its N + n calls.

    Attributes:
        kind: How it is changed.
        momentum: m of an average; None for the mean of all calls.
        count: The name of the buffer that counts the calls of an average; without one, every push is one call.
        variance: It is a variance, so never negative.
    """

    kind: RuleKind = RuleKind.newest
    momentum: float | None = None
    count: str | None = None
    variance: bool = False

    def __post_init__(self) -> None:
        if self.kind is RuleKind.average and self.momentum is None and self.count is None:
            raise ValueError("buffers: got an average without momentum and count, expected one of them")

    def weight(self, calls: int, before: int = 0) -> float:
        """The weight W of these calls of an average, after so many."""
        if self.momentum is None:
            return calls / (before + calls) if calls else 0.0
        return self.momentum if calls == 1 else 1 - (1 - self.momentum) ** calls


NEWEST = Rule()
