"""Threads that do the work of calls, so that the agent's own threads, which are confined, do nothing but hand it over."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

THREADS = 8
"""The number of threads; a call waits for the service's lock, or for a moment to open a data path."""
_log = logging.getLogger(__name__)


class Dispatcher:
    """Runs calls in ordinary threads, in the order in which they come.

    All threads start with the object, which is to be made before the agent is: a thread that a confined one starts is
    confined as well.

    Args:
        threads: Their number.
    """

    def __init__(self, threads: int = THREADS) -> None:
        self._calls = queue.SimpleQueue[Callable[[], None] | None]()
        self._threads = [threading.Thread(target=self._run, name=f"call {number}", daemon=True) for number in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[[], None]) -> None:
        """Run a call soon; what it raises is logged."""
        self._calls.put(call)

    def close(self) -> None:
        """End the threads, after the calls that are under way."""
        for _ in self._threads:
            self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except Exception:
                _log.exception("a call could not be done")
            del call  # with what it holds, such as a gradient, before the wait for the next one
