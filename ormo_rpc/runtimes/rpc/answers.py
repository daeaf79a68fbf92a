"""Who waits for which answer: a Future for each worker that has asked, open until its reply is due.

Nobody waits in a thread of the server for another worker: a reply that is not due leaves the Future open, and whatever makes
it due completes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from torch.futures import Future

from ormo_rpc.errors import PushRefused
from ormo_rpc.messages import Refusal, Reply

Answer = Reply | Refusal
"""What a call is answered with."""
Due = tuple["Future[Answer]", Reply | Exception]
"""A Future and what it is to be completed with."""


class Answers:
    """The open Futures; whoever uses it holds the lock of the service.

    Args:
        holds_farewell: Whether the word to stop is held back.
    """

    def __init__(self, *, holds_farewell: bool) -> None:
        self.holds_farewell = holds_farewell
        self._handed: dict[int, float] = {}
        """When each worker was given its newest reply."""
        self._open: dict[int, Future[Answer]] = {}

    def expect(self, worker: int, future: Future[Answer]) -> list[Due]:
        """Open the Future of a worker's next reply; a repeated call takes the place of the former."""
        former = self._open.get(worker)
        self._open[worker] = future
        return [] if former is None else [(former, TimeoutError(f"worker {worker} has asked again"))]

    def close(self, worker: int) -> Future[Answer] | None:
        """The Future of a worker's next reply, which no reply completes any more; None where there is none."""
        return self._open.pop(worker, None)

    def due(self, replies: Iterable[Reply]) -> list[Due]:
        """The Futures that these replies complete.

        Were they looked up when the lock is released, a reply that is late to be sent could answer its worker's next push.
        """
        replies = [reply for reply in replies if not (self.holds_farewell and reply.ticket is None)]
        self._handed |= {reply.worker: time.monotonic() for reply in replies}
        return [(self._open.pop(reply.worker), reply) for reply in replies if reply.worker in self._open]

    def late(self, workers: Iterable[int], patience_seconds: float) -> list[int]:
        """Those of some workers, which have all had a reply, whose newest one was given longer ago than that."""
        now = time.monotonic()
        return [worker for worker in workers if now - self._handed[worker] > patience_seconds]


def without(due: Iterable[Due], future: Future[Answer]) -> list[Due]:
    """All but what was due to this one, who gets another answer."""
    return [each for each in due if each[0] is not future]


def send(due: Iterable[Due]) -> None:
    """Complete Futures; a reply never changes after it is issued, so no lock is needed."""
    for future, outcome in due:
        future.set_result(outcome if isinstance(outcome, Reply) else _refusal(outcome))


def answered(call: Callable[[], Future[Answer]]) -> Future[Answer]:
    """Make a call; a refusal is an answer, too."""
    try:
        return call()
    except PushRefused as error:
        future = Future[Answer]()
        future.set_result(_refusal(error))
        return future


def _refusal(error: Exception) -> Refusal:
    return Refusal(error=type(error).__name__, text=str(error))
