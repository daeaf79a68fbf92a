"""Virtual time: a queue of events, and a clock that jumps from one to the next."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class EventQueue:
    """Calls functions at virtual times, in the order of their times; those of one time in the order of scheduling.

    Attributes:
        now: The present virtual time, in seconds.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def at(self, seconds: float, function: Callable[..., None], *arguments: Any) -> None:
        """Call ``function(*arguments)`` at a virtual time, which is not in the past."""
        assert seconds >= self.now, "time runs forward"
        heapq.heappush(self._queue, (seconds, self._count, function, arguments))
        self._count += 1

    def step(self) -> bool:
        """Let the next event happen; False when there is none."""
        if not self._queue:
            return False
        self.now, _, function, arguments = heapq.heappop(self._queue)
        function(*arguments)
        return True
