"""The door: where workers ask to be let in, and the lease that tells whether they still live.

A worker connects, both sides prove that they know the secret of the run (`wire`), and it is told its membership, the configuration
and, where there is one, the address of the server's agent. It connects once more for its pushes (`streams`). The first
connection stays open for as long as the worker works. Each beat of the worker's is answered; one that falls silent for
``runtime.worker_timeout_seconds``, or whose connection ends, is lost. Because the operating system closes the connections of
whoever dies, a death is known at once, on any machine.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ormo_rpc.errors import RunEnded, WireError
from ormo_rpc.rendezvous import protocol as wire
from ormo_rpc.rendezvous.memberships import Membership
from ormo_rpc.rendezvous.secret import Secret

HANDSHAKE_SECONDS = 10.0
"""How long a caller may take to prove who it is."""
BEAT_BYTES = 1024
"""The longest line of a worker that was let in."""
MAX_UNAUTHENTICATED = 32
"""How many callers may be at proving it; further ones wait in the listener's queue."""
_log = logging.getLogger(__name__)


class MembershipHandler(Protocol):
    """Who decides about memberships."""

    def join(self, hello: Mapping[str, Any]) -> Membership:
        """Give a membership to a process that has proved to know the secret; a ValueError tells it why not."""
        ...

    def evict(self, membership: Membership, reason: str) -> None:
        """The holder of a membership is gone, or as good as."""
        ...

    def request_leave(self, membership: Membership) -> None:
        """The holder of a membership wants to leave."""
        ...


class Listener:
    """Lets workers in; use it as a context, whose end closes every connection.

    Each connection has a thread of its own, which waits for nothing but its worker. `_lock` guards the set of open connections.

    Args:
        listener: A listening socket.
        secret: Of the run.
        keeper: Decides about memberships; it has a lock of its own.
        join_response: What everybody who is let in is told besides its membership.
        patience_seconds: After how much silence a worker is lost.
        streams: Serves, to its end, the connection of a worker that was let in before and comes with its pushes.
    """

    def __init__(
        self,
        listener: socket.socket,
        secret: Secret,
        keeper: MembershipHandler,
        join_response: Mapping[str, Any],
        patience_seconds: float,
        streams: Callable[[wire.LineReader], None] = lambda _: None,
    ) -> None:
        self.listener = listener
        self.secret = secret
        self.keeper = keeper
        self.join_response = dict(join_response)
        self.patience_seconds = patience_seconds
        self.streams = streams
        self._strangers = threading.BoundedSemaphore(MAX_UNAUTHENTICATED)
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._closed = False

    def __enter__(self) -> Listener:
        threading.Thread(target=self._let_in, name="door", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
            connections = list(self._open)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _let_in(self) -> None:
        while True:
            self._strangers.acquire()
            try:
                connection, (host, port, *_) = self.listener.accept()
            except OSError as error:  # such as too many open files: those who are inside go on
                self._strangers.release()
                if self._closed:
                    return
                _log.warning("the door cannot let anybody in: %s", error)
                threading.Event().wait(1.0)
                continue
            threading.Thread(
                target=self._attend, args=(connection, f"{host}:{port}"), name=f"door {host}:{port}", daemon=True
            ).start()

    def _attend(self, connection: socket.socket, caller: str) -> None:
        """One connection, from its first byte to its last."""
        with connection:
            with self._lock:
                if self._closed:
                    return
                self._open.add(connection)
            try:
                try:
                    reader = wire.LineReader(connection)
                    hello = wire.greet_worker(reader, self.secret, HANDSHAKE_SECONDS)
                    membership = None if hello.get("stream") is True else self.keeper.join(hello)
                finally:
                    self._strangers.release()
                if membership is None:
                    self._stream(reader)
                else:
                    self._keep(connection, reader, membership)
            except (WireError, ValueError, OSError, EOFError) as error:
                _log.warning("%s was not let in: %s", caller, error)
                if isinstance(error, ValueError):  # which is ours; of the others it knows already
                    with contextlib.suppress(OSError, EOFError):
                        wire.send(connection, {"error": str(error), "ended": isinstance(error, RunEnded)})
            finally:
                with self._lock:
                    self._open.discard(connection)

    def _stream(self, reader: wire.LineReader) -> None:
        """The pushes of a worker. Its end means nothing by itself: whether the worker lives is known from its lease."""
        with contextlib.suppress(EOFError):
            self.streams(reader)

    def _keep(self, connection: socket.socket, reader: wire.LineReader, membership: Membership) -> None:
        """The lease of a worker: beats, until it leaves or is lost."""
        try:
            wire.send(connection, {**self.join_response, "worker": membership.worker, "session_id": membership.session_id})
            while True:
                message = reader.receive(self.patience_seconds, BEAT_BYTES)
                if "leave" in message:
                    self.keeper.request_leave(membership)
                wire.send(connection, {"beat": True})
        except TimeoutError:
            reason = f"it was silent for {self.patience_seconds:g} s"
        except (OSError, EOFError):
            reason = "its connection was closed"
        except WireError as error:
            reason = f"it sent nonsense: {error}"
        if not self._closed:  # else it is we who have closed it
            self.keeper.evict(membership, reason)
