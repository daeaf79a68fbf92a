"""The worker's side of the rendezvous: the lease, which heartbeats keep."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Mapping
from typing import Any

from ormo_rpc.errors import Refused, WireError
from ormo_rpc.rendezvous.addresses import written
from ormo_rpc.rendezvous.connecting import open_connection
from ormo_rpc.rendezvous.protocol import Admission, LineReader, authenticate_server, from_server, send
from ormo_rpc.rendezvous.secret import Secret

HANDSHAKE_SECONDS = 20.0
"""For each step: a connection waits while a server is started again, and one whose peer has vanished is given up."""
MAX_RESPONSE_BYTES = 1 << 25
"""The longest line of an authenticated server; the fingerprint of a layer has some 100 bytes."""


class Lease:
    """The connection on which a process was admitted, kept by heartbeats; use it as a context, whose end closes it.

    One thread sends heartbeats and one reads what the server sends, so that neither waits for the other.

    Args:
        connection: To the server's listener, authenticated.
        reader: Of that connection.
        admission: The server's answer.
    """

    def __init__(self, connection: socket.socket, reader: LineReader, admission: Admission) -> None:
        self.connection = connection
        self.reader = reader
        self.admission = admission
        self.lost = threading.Event()
        """Set once the server has been silent for too long, or the connection is closed."""
        self.received: Callable[[Mapping[str, Any]], None] = lambda _: None
        """Called, in the thread that reads, with each message that is not a heartbeat, and with an empty one at the end."""
        self._send_lock = threading.Lock()
        """Guards the sending side of the connection."""

    def __enter__(self) -> Lease:
        threading.Thread(target=self._send_heartbeats, name="lease heartbeats", daemon=True).start()
        threading.Thread(target=self._receive, name="lease answers", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.lost.set()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()

    @property
    def local_host(self) -> str:
        """This machine's address on the connection, at which whatever listens for the server is to be bound."""
        return str(self.connection.getsockname()[0])

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message; where that fails, the lease is lost."""
        try:
            with self._send_lock:
                send(self.connection, message)
        except (OSError, EOFError):
            self.lost.set()

    def _send_heartbeats(self) -> None:
        while not self.lost.wait(self.admission.heartbeat_seconds):
            self.send({"heartbeat": True})

    def _receive(self) -> None:
        try:
            while not self.lost.is_set():
                message = self.reader.receive(self.admission.timeout_seconds, MAX_RESPONSE_BYTES)
                if "heartbeat" not in message:
                    self.received(message)
        except (OSError, EOFError, WireError):  # a time-out is an OSError
            self.lost.set()
        self.received({})


def refused_by(address: tuple[str, int], error: Refused) -> Refused:
    """The refusal of a server, with its address."""
    return Refused(f"the server at {written(*address)} refused this worker: {error}")


def connect(
    address: tuple[str, int], secret: Secret, *, timeout_seconds: float, waits_for: Callable[[str], None] = lambda _: None
) -> Lease:
    """Make one attempt to be admitted.

    Args:
        address: Host and port of the server's listener.
        secret: Of the run.
        timeout_seconds: For each step of it; the connection has at most `CONNECT_SECONDS`, any other one `HANDSHAKE_SECONDS`.
        waits_for: Called with what is waited for, in words.

    Raises:
        OSError, EOFError: the server cannot be reached.
        WireError: the server refuses this process (`Refused`), or does not know the secret.
    """
    connection = open_connection(address, timeout_seconds)
    waits_for("connected, and the server does not answer yet")
    timeout_seconds = min(timeout_seconds, HANDSHAKE_SECONDS)
    try:
        reader = LineReader(connection)
        try:
            request = {"lease": {"pid": os.getpid(), "host": socket.gethostname()}}
            authenticate_server(reader, secret, request, timeout_seconds)
            message = reader.receive(timeout_seconds, MAX_RESPONSE_BYTES)
            if "error" in message:
                raise Refused(str(message["error"]))
        except Refused as error:
            raise refused_by(address, error) from None
        return Lease(connection, reader, from_server(Admission, message, "admission"))
    except BaseException:
        connection.close()
        raise
