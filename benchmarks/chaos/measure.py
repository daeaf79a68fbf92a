"""How long it takes until a death is noticed, and until its gap is filled, from a trace that was watched."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from benchmarks.chaos.faults import Chaos, Loss
from benchmarks.chaos.watch import Seen, Trace

EVICTION = "SIGKILL of a worker to its eviction"
JOIN = "SIGKILL of a worker to its replacement's join"
GRADIENT = "SIGKILL of a worker to its replacement's first applied gradient"
SERVER = "SIGKILL of the server to the next applied gradient"


def times(chaos: Chaos) -> dict[str, list[float]]:
    """All that could be measured, in seconds; a replacement that was hit itself before it came is left out."""
    found: dict[str, list[float]] = {name: [] for name in (EVICTION, JOIN, GRADIENT, SERVER)}
    trace = chaos.run.trace
    for loss in (loss for loss in chaos.losses if loss.killed):
        for name, when in zip((EVICTION, JOIN, GRADIENT), _steps(trace, loss), strict=False):
            found[name].append(when - loss.at)
    for at, life in chaos.killed_at:
        first = next((seen for seen in trace.seen if seen.life == life + 1 and seen.data["event"] == "apply"), None)
        if first is not None:
            found[SERVER].append(trace.when(first) - at)
    return found


def summed_up(found: dict[str, list[float]]) -> list[tuple[str, ...]]:
    """A table: how many were measured, median and maximum."""
    rows: list[tuple[str, ...]] = [("seconds from", "measured", "median", "maximum")]
    for name, values in found.items():
        figures = (f"{statistics.median(values):.2f}", f"{max(values):.2f}") if values else ("-", "-")
        rows.append((name, str(len(values)), *figures))
    return rows


def _steps(trace: Trace, loss: Loss) -> list[float]:
    """When it was evicted, when its replacement joined, and when this one's first gradient was applied, as far as it came."""
    steps: list[float] = []
    later: Sequence[Seen] = [seen for seen in trace.seen if seen.life == loss.life and seen.at >= loss.at]
    for kind in ("leave", "join", "apply"):
        place = _first(trace, later, kind, loss)
        if place is None:
            break
        steps.append(trace.when(later[place]))
        later = later[place + 1 :]
    return steps


def _first(trace: Trace, later: Iterable[Seen], kind: str, loss: Loss) -> int | None:
    for place, seen in enumerate(later):
        if seen.data["event"] == kind and seen.data["worker"] == loss.worker and trace.when(seen) > loss.at - 0.05:
            return place
    return None
