"""Seconds from a kill to the eviction, to the replacement, and to its first gradient, from the trace."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from tests.chaos.injector import ExpectedEviction, FaultInjector
from tests.chaos.trace import TraceEvent, TraceFollower

EVICTION = "SIGKILL of a worker to its eviction"
JOIN = "SIGKILL of a worker to its replacement's join"
GRADIENT = "SIGKILL of a worker to its replacement's first applied gradient"
SERVER = "SIGKILL of the server to the next applied gradient"


def recovery_times(injector: FaultInjector) -> dict[str, list[float]]:
    """All measured durations by name; a replacement that was hit by another fault before it joined is left out."""
    found: dict[str, list[float]] = {name: [] for name in (EVICTION, JOIN, GRADIENT, SERVER)}
    trace = injector.run.trace
    for eviction in (eviction for eviction in injector.evictions if eviction.killed):
        for name, when in zip((EVICTION, JOIN, GRADIENT), _recovery(trace, eviction), strict=False):
            found[name].append(when - eviction.hit_at)
    for killed_at, incarnation in injector.server_kills:
        applied = (e for e in trace.events if e.incarnation > incarnation and e.data["event"] == "apply")
        if (first := next(applied, None)) is not None:
            found[SERVER].append(trace.happened_at(first) - killed_at)
    return found


def as_rows(times: dict[str, list[float]]) -> list[tuple[str, ...]]:
    """A header, and for each name the count, median and maximum."""
    rows: list[tuple[str, ...]] = [("seconds from", "measured", "median", "maximum")]
    for name, values in times.items():
        figures = (f"{statistics.median(values):.2f}", f"{max(values):.2f}") if values else ("-", "-")
        rows.append((name, str(len(values)), *figures))
    return rows


def _recovery(trace: TraceFollower, eviction: ExpectedEviction) -> list[float]:
    """Return the times of eviction, of the replacement's join, and of its first applied gradient, as far as it came."""
    moments: list[float] = []
    later: Sequence[TraceEvent] = [
        event for event in trace.events if event.incarnation == eviction.incarnation and event.read_at >= eviction.hit_at
    ]
    for kind in ("leave", "join", "apply"):
        index = _first(trace, later, kind, eviction)
        if index is None:
            break
        moments.append(trace.happened_at(later[index]))
        later = later[index + 1 :]
    return moments


def _first(trace: TraceFollower, later: Iterable[TraceEvent], kind: str, eviction: ExpectedEviction) -> int | None:
    for index, event in enumerate(later):
        of_worker = event.data["event"] == kind and event.data["worker"] == eviction.worker
        if of_worker and trace.happened_at(event) > eviction.hit_at - 0.05:
            return index
    return None
