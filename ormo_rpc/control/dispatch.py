"""Threads that do the work of calls, so that the agent's own threads, which are confined, do nothing but hand it over."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable

QUICK_THREADS = 4
"""Threads for calls that wait for nothing but the service's lock, such as pushes: more of them only pass the lock around."""
WAITING_THREADS = 8
"""Threads for calls that may wait for a worker, such as one that opens a data path to it."""
Work = tuple[Callable[[], None], Callable[[Exception], None]]
_log = logging.getLogger(__name__)


class Dispatcher:
    """Runs calls in ordinary threads, in the order in which they come, quick ones apart from those that may wait.

    All threads start with the object, which is to be made before the agent is: a thread that a confined one starts is
    confined as well. If all threads for calls that may wait do so, further ones of them wait as well, and pushes do not.
    """

    def __init__(self) -> None:
        self._queues = {
            False: (queue.SimpleQueue[Work | None](), QUICK_THREADS),
            True: (queue.SimpleQueue[Work | None](), WAITING_THREADS),
        }
        """Calls and their number of threads, by whether a call may wait."""
        self.threads = [
            threading.Thread(target=_run, args=(calls,), name=f"{'waiting' if waits else 'quick'} call {n}", daemon=True)
            for waits, (calls, threads) in self._queues.items()
            for n in range(threads)
        ]
        for thread in self.threads:
            thread.start()

    def submit(
        self, call: Callable[[], None], *, may_wait: bool = False, failed: Callable[[Exception], None] = lambda _: None
    ) -> None:
        """Run a call soon.

        Args:
            call: What it raises is logged.
            may_wait: For anything but the service's lock.
            failed: Called with what the call raises, such as to tell the caller.
        """
        self._queues[may_wait][0].put((call, failed))

    def close(self) -> None:
        """End the threads, after the calls that have been submitted."""
        for calls, threads in self._queues.values():
            for _ in range(threads):
                calls.put(None)


def _run(calls: queue.SimpleQueue[Work | None]) -> None:
    while (work := calls.get()) is not None:
        call, failed = work
        try:
            call()
        except Exception as error:
            _log.exception("a call could not be done")
            with contextlib.suppress(Exception):  # the caller may have had its result
                failed(error)
        del work, call, failed  # with what they hold, such as a gradient, before the wait for the next one
