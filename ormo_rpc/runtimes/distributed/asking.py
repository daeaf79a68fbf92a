"""The requests to a child, by its launcher or by signals, and what they reach: a server, a worker, or neither yet."""

from __future__ import annotations

import os
import threading
from signal import Signals
from typing import Any, Protocol

from ormo_rpc.runtimes.distributed.launcher.child import EXIT_DONE


class Serving(Protocol):
    """A server that can be asked."""

    def handle(self, message: dict[str, Any]) -> None:
        """Handle a message of the launcher's; called by one thread at a time."""
        ...


class Working(Protocol):
    """A worker that can be asked to leave."""

    def leave(self) -> None:
        """Ask to leave; called from another thread."""
        ...


class ServerControl:
    """Hands the supervisor's messages and the signals to the server, also those that come before it is ready.

    `_lock` guards the server and the early messages, so that each message is handled once and in order.

    Args:
        incarnation: The number of earlier processes of this server.
    """

    def __init__(self, incarnation: int) -> None:
        self._lock = threading.Lock()
        self._nothing_to_save = incarnation == 0
        """Before the server is ready; a later incarnation has the journal's pushes, which no checkpoint has."""
        self._server: Serving | None = None
        self._early: list[dict[str, Any]] = []

    def stop(self, number: Signals) -> None:
        """Stop on a signal, as on the supervisor's message."""
        self.handle({"stop": {"status": "interrupted", "reason": number.name}})

    def handle(self, message: dict[str, Any]) -> None:
        """Handle a message, or keep it until there is a server; ``stop`` ends a process that has nothing to save."""
        with self._lock:
            if self._server is not None:
                self._server.handle(message)
            elif "stop" in message and self._nothing_to_save:
                os._exit(128 + Signals[message["stop"]["reason"]])
            else:
                self._early.append(message)

    def connect(self, server: Serving) -> None:
        """Hand the early messages to the server, and all later ones."""
        with self._lock:
            self._server = server
            for message in self._early:
                server.handle(message)


class WorkerControl:
    """Lets the worker leave when the supervisor or a signal asks for it, also before there is one.

    `_lock` guards the worker.

    Attributes:
        left_on: The first signal that asked for it; None where there was none.
    """

    def __init__(self) -> None:
        self.left_on: Signals | None = None
        self._lock = threading.Lock()
        self._worker: Working | None = None

    def leave(self, number: Signals | None = None) -> None:
        """Leave; a process that has no worker yet ends at once."""
        self.left_on = self.left_on or number
        with self._lock:
            if self._worker is None:
                os._exit(EXIT_DONE if number is None else 128 + number)
            # By another thread, as a server that hangs takes its time, and this one has to notice the supervisor's end.
            threading.Thread(target=self._worker.leave, name="leave", daemon=True).start()

    def connect(self, worker: Working) -> None:
        """Ask this worker from now on."""
        with self._lock:
            self._worker = worker
