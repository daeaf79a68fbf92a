"""The worker's side of the rendezvous: joining a run, and the lease that heartbeats keep."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ormo_rpc.errors import Refused, RunEnded, ServerLost, WireError
from ormo_rpc.rendezvous.protocol import JoinRequest, JoinResponse, LineReader, authenticate_server, send
from ormo_rpc.rendezvous.secret import Secret

MAX_RESPONSE_BYTES = 1 << 25
"""The longest line of an authenticated server; the fingerprint of a layer has some 100 bytes."""
RETRY_SECONDS = 0.2
"""The pause between two attempts to connect."""
WARN_AFTER_SECONDS = 5.0
"""Failed attempts are logged after this time."""
_log = logging.getLogger(__name__)


class Lease:
    """The connection on which a worker has joined, kept by heartbeats; use it as a context, whose end closes it.

    One thread sends heartbeats and one reads the answers, so that neither waits for the other.

    Args:
        connection: To the server's listener, authenticated.
        reader: Of that connection.
        join_response: The server's answer.
    """

    def __init__(self, connection: socket.socket, reader: LineReader, join_response: JoinResponse) -> None:
        self.connection = connection
        self.reader = reader
        self.join_response = join_response
        self.lost = threading.Event()
        """Set once the server has been silent for too long, or the connection is closed."""
        self._send_lock = threading.Lock()
        """Guards the sending side of the connection."""

    def __enter__(self) -> Lease:
        threading.Thread(target=self._send_heartbeats, name="lease heartbeats", daemon=True).start()
        threading.Thread(target=self._receive_heartbeats, name="lease answers", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.lost.set()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()

    def leave(self) -> None:
        """Ask to leave: after the ticket that this worker computes, or at once where it waits for one."""
        self._send({"leave": True})

    def _send_heartbeats(self) -> None:
        while not self.lost.wait(self.join_response.heartbeat_seconds):
            self._send({"heartbeat": True})

    def _send(self, message: dict[str, Any]) -> None:
        try:
            with self._send_lock:
                send(self.connection, message)
        except (OSError, EOFError):
            self.lost.set()

    def _receive_heartbeats(self) -> None:
        try:
            while not self.lost.is_set():
                self.reader.receive(self.join_response.timeout_seconds, MAX_RESPONSE_BYTES)
        except (OSError, EOFError, WireError):  # a time-out is an OSError
            self.lost.set()


def connect(
    address: tuple[str, int],
    secret: Secret,
    *,
    preferred_worker: int | None,
    slot_id: str,
    timeout_seconds: float,
    stopping: Callable[[], bool] = lambda: False,
) -> Lease:
    """Join a run, and try again for as long as its server cannot be reached.

    Args:
        address: Host and port of the server's listener.
        secret: Of the run.
        preferred_worker: The worker number to have, if it is free.
        slot_id: See `JoinRequest.slot_id`.
        timeout_seconds: Give up after this time.
        stopping: Returns True once this worker has been asked to leave; then it gives up.

    Raises:
        ServerLost: no server was reached in time, or the worker is stopping.
        RunEnded: the run is over.
        WireError: the server refuses this worker (`Refused`), or does not know the secret.
    """
    started, warned = time.monotonic(), False
    request = JoinRequest(preferred_worker=preferred_worker, pid=os.getpid(), host=socket.gethostname(), slot_id=slot_id)
    while True:
        waited = time.monotonic() - started
        left = timeout_seconds - waited
        try:
            return _join(address, secret, request, max(left, 0.01))
        except (OSError, EOFError) as error:
            reason = f"no server can be joined at {address[0]}:{address[1]}: {error or type(error).__name__}"
            if left <= 0 or stopping():
                raise ServerLost(f"{reason}; gave up after {waited:.1f} s") from None
            if waited > WARN_AFTER_SECONDS and not warned:
                warned = True
                _log.warning("%s; trying for another %.0f s", reason, left)
        time.sleep(RETRY_SECONDS)


def _join(address: tuple[str, int], secret: Secret, request: JoinRequest, timeout_seconds: float) -> Lease:
    """Make one attempt."""
    connection = socket.create_connection(address, timeout_seconds)
    try:
        reader = LineReader(connection)
        try:
            authenticate_server(reader, secret, asdict(request), timeout_seconds)
            message = reader.receive(timeout_seconds, MAX_RESPONSE_BYTES)
            if message.get("run_ended"):
                raise RunEnded(str(message["error"]))
            if "error" in message:
                raise Refused(str(message["error"]))
        except Refused as error:
            raise Refused(f"the server at {address[0]}:{address[1]} refused this worker: {error}") from None
        return Lease(connection, reader, JoinResponse.parse(message))
    except BaseException:
        connection.close()
        raise
