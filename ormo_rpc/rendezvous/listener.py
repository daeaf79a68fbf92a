"""The server's side of the rendezvous: accepts connections, authenticates them, and holds the lease of each worker.

A worker connects, both sides prove that they know the secret of the run, and the worker gets its `JoinResponse`. That
connection stays open for as long as it works and is its lease: each heartbeat is answered, and a worker that is silent for
``runtime.worker_timeout_seconds``, or whose connection ends, is evicted. The operating system closes the connections of a
process that dies, so a death is noticed at once, from any machine. For a transport by stream a worker connects once more.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import Protocol

from ormo_rpc.errors import RunEnded, WireError
from ormo_rpc.rendezvous.memberships import Membership
from ormo_rpc.rendezvous.protocol import JoinRequest, JoinResponse, LineReader, authenticate_worker, send
from ormo_rpc.rendezvous.secret import Secret

HANDSHAKE_TIMEOUT_SECONDS = 10.0
"""A connection that is not authenticated by then is closed."""
MAX_HEARTBEAT_BYTES = 1024
"""The longest line of a worker that has joined."""
MAX_UNAUTHENTICATED = 32
"""Connections whose handshake is under way; further ones wait in the socket's queue."""
ACCEPT_RETRY_SECONDS = 1.0
"""The pause after a connection could not be accepted."""
_log = logging.getLogger(__name__)


class MembershipHandler(Protocol):
    """Decides about memberships; called from the threads of several connections at once."""

    def join(self, request: JoinRequest) -> Membership:
        """Give an authenticated process a membership.

        Raises:
            ValueError: it is refused; the message, which says why, is sent to it. `RunEnded` where the run is over.
        """
        ...

    def evict(self, membership: Membership, reason: str) -> None:
        """End the membership of a process that has died or does not answer."""
        ...

    def request_leave(self, membership: Membership) -> None:
        """Let a worker leave, as it has asked to, as soon as it holds no ticket."""
        ...


class Listener:
    """Serves the listening socket of a run; use it as a context, whose end closes every connection.

    Each connection has a thread of its own, which waits for nothing but its peer. `_lock` guards `_connections` and `_closed`.

    Args:
        sock: A listening socket.
        secret: Of the run.
        handler: Decides about memberships.
        response: The answer to a worker that has joined.
        timeout_seconds: A worker that is silent for longer is evicted.
        serve_stream: Serves, to its end, the authenticated connection on which a worker that has joined pushes.
    """

    def __init__(
        self,
        sock: socket.socket,
        secret: Secret,
        handler: MembershipHandler,
        response: Callable[[Membership], JoinResponse],
        timeout_seconds: float,
        serve_stream: Callable[[LineReader], None] = lambda _: None,
    ) -> None:
        self.sock = sock
        self.secret = secret
        self.handler = handler
        self.response = response
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
                    membership = None if stream else self.handler.join(JoinRequest.parse(request))
                finally:
                    self._unauthenticated.release()
                if membership is None:
                    with contextlib.suppress(EOFError):  # no reason to evict: the lease decides whether a worker is alive
                        self.serve_stream(reader)
                else:
                    self._hold_lease(connection, reader, membership)
            except (WireError, ValueError, OSError, EOFError) as error:
                _log.warning("refused a connection from %s: %s", peer, error)
                if isinstance(error, ValueError):  # a refusal of ours; the peer knows of the others
                    with contextlib.suppress(OSError, EOFError):
                        send(connection, {"error": str(error), "run_ended": isinstance(error, RunEnded)})
            finally:
                with self._lock:
                    self._connections.discard(connection)

    def _hold_lease(self, connection: socket.socket, reader: LineReader, membership: Membership) -> None:
        """Answer a worker's heartbeats, until it leaves or has to be evicted."""
        try:
            send(connection, asdict(self.response(membership)))
            while True:
                message = reader.receive(self.timeout_seconds, MAX_HEARTBEAT_BYTES)
                if "leave" in message:
                    self.handler.request_leave(membership)
                send(connection, {"heartbeat": True})
        except TimeoutError:
            reason = f"it was silent for {self.timeout_seconds:g} s"
        except (OSError, EOFError):
            reason = "its connection was closed"
        except WireError as error:
            reason = f"it violated the protocol: {error}"
        if not self._closed.is_set():  # else the connection was closed by us
            self.handler.evict(membership, reason)
