"""Virtual time: a queue of events, and a clock that jumps from one to the next."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class EventQueue:
    """A priority queue of events at virtual times; those at the same time are popped in the order of scheduling.

    Attributes:
        now: The present virtual time, in seconds.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, str, Any]] = []
        self._count = 0

    def at(self, seconds: float, name: str, argument: Any = None) -> None:
        """Schedule the event ``name`` at a virtual time, which must not be in the past."""
        assert seconds >= self.now, "time runs forward"
        heapq.heappush(self._queue, (seconds, self._count, name, argument))
        self._count += 1

    def pop(self) -> tuple[str, Any] | None:
        """Pop the next event and advance the clock to it; None when there is none."""
        if not self._queue:
            return None
        self.now, _, name, argument = heapq.heappop(self._queue)
        return name, argument

    def next_of(self, name: str, count: int | None = None) -> list[Any]:
        """Return the arguments of the next events of one name, at most so many, in order; they stay scheduled."""
        events = [event for event in self._queue if event[2] == name]
        if count == 1:  # mostly; no two events have the same time and number, so that arguments are not compared
            return [min(events)[-1]] if events else []
        return [event[-1] for event in heapq.nsmallest(len(events) if count is None else count, events)]

    def times_of(self, name: str) -> list[float]:
        """Return the times of the events of one name."""
        return sorted(event[0] for event in self._queue if event[2] == name)

    def drop(self, unwanted: Callable[[str, Any], bool]) -> None:
        """Remove the events with an unwanted name and argument."""
        self._queue = [event for event in self._queue if not unwanted(*event[2:])]
        heapq.heapify(self._queue)

    def state_dict(self) -> dict[str, Any]:
        """Return the clock and all scheduled events, copied but for their arguments."""
        return {"now": self.now, "count": self._count, "events": sorted(self._queue, key=lambda event: event[:2])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.now, self._count = state["now"], state["count"]
        self._queue = [tuple(event) for event in state["events"]]
