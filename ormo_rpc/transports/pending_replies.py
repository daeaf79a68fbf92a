"""Futures of replies that are not due yet: one for each worker that waits, open until its reply is due.

No thread waits under the server's lock for another worker: a reply that is not due leaves its future open, and the call that
makes it due completes it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable

from ormo_rpc.errors import PushRefused
from ormo_rpc.messages import ErrorReply, Reply

ServerResponse = Reply | ErrorReply
"""The outcome of a call."""
LIVENESS_SECONDS = 1
"""The interval at which a waiting side checks that the other one is alive."""


class ReplyFuture:
    """A response that may still be to come. `_lock` guards all of it; callbacks run without it.

    A Future of torch would release the interpreter's lock at every touch, and one of the standard library costs as much as the
    rest of a small push.
    """

    __slots__ = ("_callbacks", "_lock", "_response")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._response: ServerResponse | None = None
        self._callbacks: list[Callable[[ReplyFuture], None]] = []

    def done(self) -> bool:
        """Tell whether the response has arrived."""
        return self._response is not None

    def value(self) -> ServerResponse:
        """The response of a completed future."""
        assert self._response is not None, "the future is not completed"
        return self._response

    def wait(self, timeout_seconds: float | None = None) -> ServerResponse:
        """Wait for the response.

        Raises:
            TimeoutError: it has not come in time.
        """
        completed = threading.Event()
        self.add_done_callback(lambda _: completed.set())
        if not completed.wait(timeout_seconds):
            raise TimeoutError("the response has not come in time")
        return self.value()

    def set_result(self, response: ServerResponse) -> None:
        """Complete the future, once."""
        with self._lock:
            assert self._response is None, "completed already"
            self._response, callbacks = response, self._callbacks
        for callback in callbacks:
            callback(self)

    def add_done_callback(self, callback: Callable[[ReplyFuture], None]) -> None:
        """Call back on completion, in the thread that completes it; at once where it is complete."""
        with self._lock:
            if self._response is None:
                self._callbacks.append(callback)
                return
        callback(self)


Due = tuple[ReplyFuture, Reply | Exception]
"""A future and its outcome."""


class PendingReplies:
    """The open futures of a service, whose lock guards this object.

    Args:
        defer_shutdown: Whether replies without a ticket, which end a worker, are held back.
    """

    def __init__(self, *, defer_shutdown: bool) -> None:
        self.defer_shutdown = defer_shutdown
        self._replied_at: dict[int, float] = {}
        """The time of each worker's newest reply."""
        self._open: dict[int, ReplyFuture] = {}

    def expect(self, worker: int, future: ReplyFuture) -> list[Due]:
        """Open the future of a worker's next reply; the one of a repeated call takes the place of the former."""
        former = self._open.get(worker)
        self._open[worker] = future
        return [] if former is None else [(former, TimeoutError(f"worker {worker} has asked again"))]

    def close(self, worker: int) -> ReplyFuture | None:
        """Remove the future of a worker's next reply, which no reply completes any more; None where there is none."""
        return self._open.pop(worker, None)

    def due(self, replies: Iterable[Reply]) -> list[Due]:
        """Remove the futures that these replies complete.

        Were they looked up after the lock is released, a reply that is sent late could answer its worker's next push.
        """
        replies = [reply for reply in replies if not (self.defer_shutdown and reply.ticket is None)]
        self._replied_at |= {reply.worker: time.monotonic() for reply in replies}
        return [(self._open.pop(reply.worker), reply) for reply in replies if reply.worker in self._open]

    def late(self, workers: Iterable[int], timeout_seconds: float) -> list[int]:
        """Select the workers whose newest reply is older than that; each of them has had one."""
        now = time.monotonic()
        return [worker for worker in workers if now - self._replied_at[worker] > timeout_seconds]


def without(due: Iterable[Due], future: ReplyFuture) -> list[Due]:
    """All but the pair of this future, which gets another outcome."""
    return [each for each in due if each[0] is not future]


def complete(due: Iterable[Due]) -> None:
    """Complete futures; a reply never changes after it is issued, so no lock is needed."""
    for future, outcome in due:
        future.set_result(outcome if isinstance(outcome, Reply) else _error_reply(outcome))


def refusals_as_replies(call: Callable[[], ReplyFuture]) -> ReplyFuture:
    """Make a call of the service, with its refusal as a completed future."""
    try:
        return call()
    except PushRefused as error:
        future = ReplyFuture()
        future.set_result(_error_reply(error))
        return future


def wait_while(alive: Callable[[], bool], future: ReplyFuture) -> ServerResponse:
    """Wait for a response, for as long as the worker is alive.

    Raises:
        EOFError: it is not.
    """
    if not future.done():
        done = queue.SimpleQueue[object]()
        future.add_done_callback(done.put)
        while True:
            lives = alive()  # asked before waiting: an evicted worker is given the reason a moment later
            try:
                done.get(timeout=LIVENESS_SECONDS)
                break
            except queue.Empty:
                if not lives:
                    raise EOFError("the worker was evicted") from None
    return future.value()


def _error_reply(error: Exception) -> ErrorReply:
    return ErrorReply(error=type(error).__name__, text=str(error))
