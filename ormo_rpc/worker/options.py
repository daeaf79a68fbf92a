"""Options of the workers themselves."""

from __future__ import annotations

from dataclasses import dataclass

from ormo_rpc.options import Section, at_least_one, option

MAX_PREFETCH = 100
"""Each ticket ahead costs a model, a thread and two connections, and no network is slow enough for more to be of use."""


@dataclass(frozen=True, kw_only=True)
class WorkerOptions(Section):
    """Options of each worker."""

    PATH = "worker"
    dummy: bool = option(
        False, "push the same small numbers for every ticket and compute nothing: measures server and wire alone"
    )
    prefetch: int = option(
        0,
        "tickets that a worker has ahead, to compute on while a push is on its way; K, the number of gradients in flight, is "
        "workers x (1 + this)",
        valid=lambda v: 0 <= v <= MAX_PREFETCH,
        expected=f"a whole number from 0 to {MAX_PREFETCH}",
    )
    accumulate: int = option(
        1,
        "parts in which the batch of a ticket goes through the model, to save memory; the gradient is that of the whole batch, "
        "but for batch norms, which see each part by itself",
        valid=at_least_one,
        expected="a whole number >= 1",
    )
