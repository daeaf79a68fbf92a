"""A worker's side of the door: being let in, and telling again and again that it lives."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ormo_rpc.errors import Refused, RunEnded, ServerLost, WireError
from ormo_rpc.rendezvous import protocol as wire
from ormo_rpc.rendezvous.secret import Secret

WELCOME_BYTES = 1 << 20
"""The longest line of a server that we have let prove itself."""
RETRY_SECONDS = 0.2
"""The pause between two tries to reach the server."""
PATIENT_SECONDS = 5.0
"""How long nothing is said of tries that fail."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class JoinResponse:
    """What the server tells a worker that it lets in.

    Attributes:
        worker: The worker number.
        session_id: To come with every call.
        config: The configuration of the run, as YAML.
        agent: The address of the server's agent of torch.distributed.rpc, where it has one.
        heartbeat_seconds: How often to beat.
        patience_seconds: After how much silence each side takes the other one for lost.
    """

    worker: int
    session_id: str
    config: str
    agent: str | None
    heartbeat_seconds: float
    patience_seconds: float


class Lease:
    """The open connection to the server's door; use it as a context.

    One thread beats and one listens, so that neither waits for the other.

    Args:
        connection: To the door, with the handshake done.
        reader: Of that connection.
        join_response: What the server said.
    """

    def __init__(self, connection: socket.socket, reader: wire.LineReader, join_response: JoinResponse) -> None:
        self.connection = connection
        self.reader = reader
        self.join_response = join_response
        self.lost = threading.Event()
        """The server has not been heard for too long, or has closed the connection."""
        self._sending = threading.Lock()
        """Guards the connection's sending side."""

    def __enter__(self) -> Lease:
        for target in (self._beat, self._listen):
            threading.Thread(target=target, name=f"lease{target.__name__}", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.lost.set()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()

    def leave(self) -> None:
        """Ask to leave: after the ticket that this worker computes, or at once where it waits for one."""
        self._send({"leave": True})

    def _beat(self) -> None:
        while not self.lost.wait(self.join_response.heartbeat_seconds):
            self._send({"beat": True})

    def _send(self, message: dict[str, Any]) -> None:
        try:
            with self._sending:
                wire.send(self.connection, message)
        except (OSError, EOFError):
            self.lost.set()

    def _listen(self) -> None:
        try:
            while not self.lost.is_set():
                self.reader.receive(self.join_response.patience_seconds, WELCOME_BYTES)
        except (OSError, EOFError, WireError):  # a time-out is an OSError
            self.lost.set()


def connect(
    door: Callable[[], tuple[str, int]],
    secret: Secret,
    *,
    wanted: int | None,
    slot: str,
    timeout_seconds: float,
    leaving: Callable[[], bool] = lambda: False,
) -> Lease:
    """Knock at the door until the server opens.

    Args:
        door: Finds the server's address; it is asked at every try, since a new life of the server may have another one.
        secret: Of the run.
        wanted: The worker number to have, if it is free.
        slot: Who keeps this process running; see `Membership.slot`.
        timeout_seconds: When to give up.
        leaving: Whether we have been asked to leave.

    Raises:
        ServerLost: nobody attach in time, or we are leaving.
        RunEnded: there is no work any more.
        WireError: the server refused us (`Refused`), or is none that knows the secret.
    """
    began, warned = time.monotonic(), False
    hello = {"wanted": wanted, "process": os.getpid(), "host": socket.gethostname(), "slot": slot}
    while True:
        waited = time.monotonic() - began
        left = timeout_seconds - waited
        try:
            return _knock(door(), secret, hello, max(left, 0.01))
        except (OSError, EOFError) as error:
            host, port = door()
            reason = f"no server lets us in at {host}:{port}: {error or type(error).__name__}"
            if left <= 0 or leaving():
                raise ServerLost(f"{reason}; given up after {timeout_seconds:g} s") from None
            if waited > PATIENT_SECONDS and not warned:
                warned = True
                _log.warning("%s; trying for %.0f s more", reason, left)
        time.sleep(RETRY_SECONDS)


def _knock(door: tuple[str, int], secret: Secret, hello: dict[str, Any], timeout_seconds: float) -> Lease:
    """One try."""
    connection = socket.create_connection(door, timeout_seconds)
    try:
        reader = wire.LineReader(connection)
        try:
            wire.greet_server(reader, secret, hello, timeout_seconds)
            said = reader.receive(timeout_seconds, WELCOME_BYTES)
            if said.get("ended"):
                raise RunEnded(str(said["error"]))
            if "error" in said:
                raise Refused(str(said["error"]))
        except Refused as error:
            raise Refused(f"the server at {door[0]}:{door[1]} refused us: {error}") from None
        return Lease(connection, reader, JoinResponse(**{name: said[name] for name in JoinResponse.__dataclass_fields__}))
    except BaseException:
        connection.close()
        raise
