"""A checkpoint that somebody asks for: by SIGUSR1 to the server or to its launcher."""

from __future__ import annotations

import logging
import threading

from ormo_rpc.runtimes.session import Session

_log = logging.getLogger(__name__)


class RequestedCheckpoint:
    """Requests for a checkpoint, and the one that is being written for them.

    Requests that come while another checkpoint is being written get one together, which begins after it.

    Args:
        session: Of the run.
        lock: Guards the server.
    """

    def __init__(self, session: Session, lock: threading.Lock) -> None:
        self._session = session
        self._lock = lock
        self._asked = threading.Event()
        self._begun = False

    def ask(self) -> None:
        """Ask for one; called from any thread."""
        self._asked.set()

    def attend(self) -> None:
        """Begin one where it was asked for, and say which file one has become; called by the main thread, between flushes."""
        checkpoints = self._session.checkpoints
        if not self._begun and not self._asked.is_set():
            return
        with self._lock:
            if checkpoints.busy:
                return
            written, self._begun = self._begun, self._asked.is_set()
            if self._begun:
                self._asked.clear()
                self._session.copy_state()
        if written:
            self._say()

    def finish(self) -> None:
        """Say that the last checkpoint of the run is the one that was asked for, unless that was said; called after it."""
        if self._begun or self._asked.is_set():
            self._say()

    def _say(self) -> None:
        _log.warning("wrote the checkpoint that was asked for: %s", self._session.checkpoints.newest)
