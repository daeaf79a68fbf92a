"""The server's side of the rendezvous: accepts connections, authenticates them, and holds the lease of each worker.

A worker connects, both sides prove that they know the secret of the run, and the worker gets its `Admission`, with which it
joins over the control plane. That connection stays open for as long as it works and is its lease: each heartbeat is answered,
and the lease ends when the worker is silent for ``runtime.worker_timeout_seconds`` or the connection does. The operating system
closes the connections of a process that dies, so a death is noticed at once, from any machine. For a transport by stream a
worker connects once more.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Protocol

from ormo_rpc.errors import WireError, one_line
from ormo_rpc.rendezvous.protocol import MAX_NAME_CHARACTERS, Admission, LineReader, authenticate_worker, printable, send
from ormo_rpc.rendezvous.secret import Secret

HANDSHAKE_TIMEOUT_SECONDS = 10.0
"""A connection that is not authenticated by then is closed."""
MAX_LINE_BYTES = 64 * 1024
"""The longest line of a worker that holds a lease."""
MAX_UNAUTHENTICATED = 32
"""Connections whose handshake is under way; further ones wait in the socket's queue."""
ACCEPT_RETRY_SECONDS = 1.0
"""The pause after a connection could not be accepted."""
_log = logging.getLogger(__name__)


class LeaseHandler(Protocol):
    """Decides about leases; called from the threads of several connections at once."""

    def admit(self, holder: str) -> Admission:
        """Admit an authenticated process, named in words for messages."""
        ...

    def received(self, admission_id: str, message: Mapping[str, Any], send: Callable[[Mapping[str, Any]], None]) -> None:
        """Handle a message on a lease's connection that is not a heartbeat; ``send`` sends one back, from any thread.

        Raises:
            WireError: it violates the protocol; the lease ends.
        """
        ...

    def ended(self, admission_id: str, reason: str) -> None:
        """Take note of the end of a lease."""
        ...


class Listener:
    """Serves the listening socket of a run; use it as a context, whose end closes every connection.

    Each connection has a thread of its own, which waits for nothing but its peer. `_lock` guards `_connections` and `_closed`.

    Args:
        sock: A listening socket.
        secret: Of the run.
        handler: Decides about leases.
        timeout_seconds: A worker that is silent for longer loses its lease.
        serve_stream: Serves, to its end, the authenticated connection on which a worker that has joined pushes.
    """

    def __init__(
        self,
        sock: socket.socket,
        secret: Secret,
        handler: LeaseHandler,
        timeout_seconds: float,
        serve_stream: Callable[[LineReader], None] = lambda _: None,
    ) -> None:
        self.sock = sock
        self.secret = secret
        self.handler = handler
        self.timeout_seconds = timeout_seconds
        self.serve_stream = serve_stream
        self._unauthenticated = threading.BoundedSemaphore(MAX_UNAUTHENTICATED)
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._closed = threading.Event()

    def __enter__(self) -> Listener:
        threading.Thread(target=self._accept, name="listener", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed.set()
            connections = list(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._closed.is_set():
            if not self._unauthenticated.acquire(timeout=HANDSHAKE_TIMEOUT_SECONDS):
                continue
            try:
                connection, (host, port, *_) = self.sock.accept()
            except OSError as error:  # such as too many open files: workers that have joined are not affected
                self._unauthenticated.release()
                if self._closed.is_set():
                    return
                _log.warning("a connection could not be accepted: %s; trying again in %g s", error, ACCEPT_RETRY_SECONDS)
                self._closed.wait(ACCEPT_RETRY_SECONDS)
                continue
            peer = f"{host}:{port}"
            threading.Thread(target=self._serve, args=(connection, peer), name=f"connection {peer}", daemon=True).start()

    def _serve(self, connection: socket.socket, peer: str) -> None:
        """Serve one connection, from its first byte to its last."""
        with connection:
            with self._lock:
                if self._closed.is_set():
                    return
                self._connections.add(connection)
            try:
                try:
                    reader = LineReader(connection)
                    request = authenticate_worker(reader, self.secret, HANDSHAKE_TIMEOUT_SECONDS)
                    stream = request.get("stream") is True
                    admission = None if stream else self.handler.admit(_holder(request))
                finally:
                    self._unauthenticated.release()
                if admission is None:
                    with contextlib.suppress(EOFError):  # no reason to evict: the lease decides whether a worker is alive
                        self.serve_stream(reader)
                else:
                    self._hold_lease(connection, reader, admission)
            except (EOFError, ConnectionError):  # as of a worker that has tried again while no server was there to answer
                _log.info("a connection from %s has ended before its lease began", peer)
            except (WireError, ValueError, OSError) as error:
                _log.warning("refused a connection from %s: %s", peer, error)
                if isinstance(error, ValueError):  # a refusal of ours; the peer knows of the others
                    with contextlib.suppress(OSError, EOFError):
                        send(connection, {"error": str(error)})
            finally:
                with self._lock:
                    self._connections.discard(connection)

    def _hold_lease(self, connection: socket.socket, reader: LineReader, admission: Admission) -> None:
        """Answer a worker's heartbeats until its lease ends."""
        send_lock = threading.Lock()  # guards the sending side: answers to calls come from other threads

        def send_back(message: Mapping[str, Any]) -> None:
            with send_lock:
                try:
                    send(connection, message)
                except OSError:  # a time-out leaves a part of the message under way, so nothing may follow it
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)
                    raise

        try:
            send_back(asdict(admission))
            while True:
                message = reader.receive(self.timeout_seconds, MAX_LINE_BYTES)
                if "heartbeat" in message:
                    send_back({"heartbeat": True})
                else:
                    self.handler.received(admission.admission_id, message, send_back)
        except TimeoutError:
            reason = f"it was silent for {self.timeout_seconds:g} s"
        except (OSError, EOFError):
            reason = "its connection was closed"
        except WireError as error:
            reason = f"it violated the protocol: {error}"
        except Exception as error:  # whatever it is, a membership must not stay without a lease
            _log.exception("a lease could not be held")
            reason = f"the server failed: {one_line(error)}"
        if not self._closed.is_set():  # else the connection was closed by us
            self.handler.ended(admission.admission_id, reason)


def _holder(request: Mapping[str, Any]) -> str:
    """The process that wants a lease, in words.

    Raises:
        ValueError: the request is of another form.
    """
    lease = request.get("lease")
    pid, host = (lease.get("pid"), lease.get("host")) if isinstance(lease, Mapping) else (None, None)
    if type(pid) is not int or not isinstance(host, str):
        raise ValueError("handshake: got a request for neither a lease, with pid and host, nor a stream")
    return f"pid {pid} on {printable(host, MAX_NAME_CHARACTERS)}"
