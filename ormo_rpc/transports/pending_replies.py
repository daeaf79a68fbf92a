"""Who waits for which answer: a future for each worker that has asked, open until its reply is due.

Nobody waits under the server's lock for another worker: a reply that is not due leaves the future open, and whatever makes it
due keeps it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from ormo_rpc.errors import PushRefused
from ormo_rpc.messages import ErrorReply, Reply

ServerResponse = Reply | ErrorReply
"""What a call is answered with."""


class ReplyFuture:
    """An answer that is still to come. `_lock` guards all of it; callbacks run without.

    A Future of torch would let go of the interpreter at every touch, and one of the standard library costs as much as the rest
    of a small push.
    """

    __slots__ = ("_answer", "_callbacks", "_lock")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answer: ServerResponse | None = None
        self._callbacks: list[Callable[[ReplyFuture], None]] = []

    def done(self) -> bool:
        """Whether the answer is here."""
        return self._answer is not None

    def value(self) -> ServerResponse:
        """The answer, which is here."""
        assert self._answer is not None, "asked for an answer that is still to come"
        return self._answer

    def wait(self, timeout_seconds: float | None = None) -> ServerResponse:
        """Wait for the answer.

        Raises:
            TimeoutError: it has not come in time.
        """
        here = threading.Event()
        self.add_done_callback(lambda _: here.set())
        if not here.wait(timeout_seconds):
            raise TimeoutError("the answer has not come in time")
        return self.value()

    def set_result(self, answer: ServerResponse) -> None:
        """Give the answer, once."""
        with self._lock:
            assert self._answer is None, "an answer was given already"
            self._answer, callbacks = answer, self._callbacks
        for callback in callbacks:
            callback(self)

    def add_done_callback(self, callback: Callable[[ReplyFuture], None]) -> None:
        """Call back when the answer is here, in the thread that gives it; at once where it is."""
        with self._lock:
            if self._answer is None:
                self._callbacks.append(callback)
                return
        callback(self)


Due = tuple[ReplyFuture, Reply | Exception]
"""A future and what it is to be kept with."""


class PendingReplies:
    """The open futures; whoever uses it holds the lock of the service.

    Args:
        defer_shutdown: Whether the word to stop is held back.
    """

    def __init__(self, *, defer_shutdown: bool) -> None:
        self.defer_shutdown = defer_shutdown
        self._handed: dict[int, float] = {}
        """When each worker was given its newest reply."""
        self._open: dict[int, ReplyFuture] = {}

    def expect(self, worker: int, future: ReplyFuture) -> list[Due]:
        """Open the future of a worker's next reply; a repeated call takes the place of the former."""
        former = self._open.get(worker)
        self._open[worker] = future
        return [] if former is None else [(former, TimeoutError(f"worker {worker} has asked again"))]

    def close(self, worker: int) -> ReplyFuture | None:
        """The future of a worker's next reply, which no reply keeps any more; None where there is none."""
        return self._open.pop(worker, None)

    def due(self, replies: Iterable[Reply]) -> list[Due]:
        """The futures that these replies keep.

        Were they looked up when the lock is released, a reply that is late to be sent could answer its worker's next push.
        """
        replies = [reply for reply in replies if not (self.defer_shutdown and reply.ticket is None)]
        self._handed |= {reply.worker: time.monotonic() for reply in replies}
        return [(self._open.pop(reply.worker), reply) for reply in replies if reply.worker in self._open]

    def late(self, workers: Iterable[int], patience_seconds: float) -> list[int]:
        """Those of some workers, which have all had a reply, whose newest one was given longer ago than that."""
        now = time.monotonic()
        return [worker for worker in workers if now - self._handed[worker] > patience_seconds]


def without(due: Iterable[Due], future: ReplyFuture) -> list[Due]:
    """All but what was due to this one, who gets another answer."""
    return [each for each in due if each[0] is not future]


def send(due: Iterable[Due]) -> None:
    """Keep futures; a reply never changes after it is issued, so no lock is needed."""
    for future, outcome in due:
        future.set_result(outcome if isinstance(outcome, Reply) else _refusal(outcome))


def answered(call: Callable[[], ReplyFuture]) -> ReplyFuture:
    """Make a call; a refusal is an answer, too."""
    try:
        return call()
    except PushRefused as error:
        future = ReplyFuture()
        future.set_result(_refusal(error))
        return future


def _refusal(error: Exception) -> ErrorReply:
    return ErrorReply(error=type(error).__name__, text=str(error))
