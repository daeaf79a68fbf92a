"""The clocks of the server's process."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator


class Stopwatch:
    """Seconds since `start`, with those of earlier incarnations; the latter alone before."""

    def __init__(self) -> None:
        self._before = 0.0
        self._since: float | None = None

    def continue_from(self, seconds: float) -> None:
        """Count the seconds of earlier incarnations."""
        self._before = seconds

    def start(self) -> None:
        """Begin to count."""
        self._since = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Generator[None]:
        """Stop counting meanwhile; called by the one thread that there is."""
        self._before, self._since, counting = self(), None, self._since is not None
        try:
            yield
        finally:
            if counting:
                self.start()

    def __call__(self) -> float:
        """Return the seconds."""
        return self._before + (0.0 if self._since is None else time.monotonic() - self._since)


class Interval:
    """A periodic timer.

    Args:
        seconds: The period; 0 for never due.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._last = time.monotonic()

    def due(self) -> bool:
        """True once in each interval."""
        now = time.monotonic()
        if not self.seconds or now - self._last < self.seconds:
            return False
        self._last = now
        return True
