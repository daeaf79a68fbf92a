"""Events of a server, made by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ormo_rpc.server.events import Event, Kind


def apply_event(
    iteration: int, worker: int, delay: int, loss: float | None = None, metrics: Mapping[str, Any] | None = None
) -> Event:
    """Make the event of one applied gradient."""
    return Event(
        Kind.apply,
        0.0,
        {
            "iteration": iteration,
            "worker": worker,
            "delay": delay,
            "stamp": iteration - delay,
            "samples": 8,
            "loss": loss,
            "ticket": iteration,
            **({} if metrics is None else {"metrics": metrics}),
        },
    )
