"""Options of the workers themselves."""

from __future__ import annotations

from dataclasses import dataclass

from ormo_rpc.options import Section, option


@dataclass(frozen=True, kw_only=True)
class WorkerOptions(Section):
    """What a worker does with a ticket."""

    PATH = "worker"
    stand_in: bool = option(
        False, "push the same small numbers for every ticket and compute nothing: measures server and wire alone"
    )
    prefetch: int = option(
        0,
        "tickets that a worker has ahead, to compute on while a push is on its way; K: workers x (1 + this)",
        valid=lambda v: v >= 0,
        expected="a whole number >= 0",
    )
