"""Pairs of processes that end with the lease, for transports whose waits do not notice a server that is cut off."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator

from ormo_rpc.transports.base import Endpoint
from ormo_rpc.transports.pending_replies import LIVENESS_SECONDS


@contextlib.contextmanager
def closed_with_lease(endpoint: Endpoint, close: Callable[[], None]) -> Generator[None]:
    """Close a pair at the end of the context, and before where the lease has ended: that wakes whoever waits for a message.

    Args:
        endpoint: Tells of the lease.
        close: Closes the pair; from any thread, once or twice.
    """
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(LIVENESS_SECONDS):
            if not endpoint.alive():
                close()
                return

    thread = threading.Thread(target=watch, name="pair", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        close()
        thread.join()
