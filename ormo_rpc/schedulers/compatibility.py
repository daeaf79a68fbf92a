"""Compatibility of algorithm and scheduler: their capabilities decide, never their names."""

from __future__ import annotations

from ormo_rpc.algorithms.base import Algorithm
from ormo_rpc.schedulers.base import Scheduler


def incompatibility(algorithm: Algorithm | type[Algorithm], scheduler: Scheduler | type[Scheduler]) -> str | None:
    """Return why an algorithm does not run under a scheduler, as the message of an error; None where it does."""
    reason = None
    if not scheduler.IMMEDIATE:
        reason = algorithm.NEEDS_IMMEDIATE_REPLIES
    if reason is None and scheduler.BARRIER:
        reason = algorithm.NEEDS_NO_BARRIER
    return reason and f"scheduler: got {scheduler.name!r}, which {algorithm.name} does not run under: {reason}"
