"""Virtual time: a queue of events, and a clock that jumps from one to the next."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class EventQueue:
    """Events at virtual times, taken out in the order of their times; those of one time in the order of scheduling.

    Attributes:
        now: The present virtual time, in seconds.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, str, Any]] = []
        self._count = 0

    def at(self, seconds: float, name: str, argument: Any = None) -> None:
        """Let the event ``name`` happen at a virtual time, which is not in the past."""
        assert seconds >= self.now, "time runs forward"
        heapq.heappush(self._queue, (seconds, self._count, name, argument))
        self._count += 1

    def pop(self) -> tuple[str, Any] | None:
        """The next event, which happens now; None when there is none."""
        if not self._queue:
            return None
        self.now, _, name, argument = heapq.heappop(self._queue)
        return name, argument

    def drop(self, unwanted: Callable[[Any], bool]) -> None:
        """Let none of the events happen whose arguments are unwanted."""
        self._queue = [event for event in self._queue if not unwanted(event[-1])]
        heapq.heapify(self._queue)

    def state_dict(self) -> dict[str, Any]:
        """The clock and all events to come, a private copy but for their arguments."""
        return {"now": self.now, "count": self._count, "events": sorted(self._queue, key=lambda event: event[:2])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.now, self._count = state["now"], state["count"]
        self._queue = [tuple(event) for event in state["events"]]
