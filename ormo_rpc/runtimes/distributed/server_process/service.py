"""The server's side of the wire: takes a push, holds the lock for the step, and answers by promises (`answers`).

How pushes and answers cross is the business of `streams` and `handlers`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ormo_rpc.compression import PushFormat
from ormo_rpc.errors import Dismissed, NonFiniteGradient, PushRefused, Rejoin, RunEnded
from ormo_rpc.messages import Push, Reply
from ormo_rpc.models.flat import Layout
from ormo_rpc.rendezvous.memberships import Seat, Seats
from ormo_rpc.server.parameter_server import ParameterServer
from ormo_rpc.server.validation import Checked
from ormo_rpc.storage.journal import Journal, NoJournal
from ormo_rpc.transports.pending_replies import Answers, Due, Promise, send, without

LARGEST_WORKER = 1 << 15
"""Worker numbers are smaller: those of torch's agents have 16 bits."""
_log = logging.getLogger(__name__)


class Service:
    """What workers reach, and who decides at the door.

    `lock` guards the parameter server with all that belongs to it: seats, arrived, losses, journal, answers, and the times
    measured here. `broken` is never cleared, so it is read without. Payload checks run before the lock is taken; it is released
    before the journal is forced to disk, and replies are sent last.

    Args:
        server: The parameter server.
        observe: Called under the lock after everything that changed something; it must be quick.
        on_start: Called under the lock right before the first ticket is handed out.
        journal: Told, under the lock, of everything that changes the server.
        push_format: The wire form of pushes; exact by default.
        max_not_finite: After how many gradients in a row that are not finite a worker is dismissed.
        holds_farewell: Whether the word to stop is held back until `say_farewell`, so that nobody is gone before all is kept.
    """

    def __init__(
        self,
        server: ParameterServer,
        observe: Callable[[ParameterServer], None],
        on_start: Callable[[], None] = lambda: None,
        *,
        journal: Journal | NoJournal | None = None,
        push_format: PushFormat | None = None,
        max_not_finite: int = 10,
        holds_farewell: bool = False,
    ) -> None:
        self.server = server
        self.observe = observe
        self.on_start = on_start
        self.journal = journal or NoJournal()
        self.max_not_finite = max_not_finite
        self.expected = set(range(server.num_workers))
        """Who has to be ready before a first life of the server begins."""
        self.lock = threading.Lock()
        self.lock_wait_seconds = 0.0
        self.lock_held_seconds = 0.0
        self.seats = Seats(server.num_workers)
        self.arrived: list[Seat] = []
        """Who is ready to work and waits for the start."""
        self.started = threading.Event()
        self.changed = threading.Event()
        """Somebody has come or gone."""
        self.losses: list[dict[str, Any]] = []
        """Every worker that was lost, with its last ticket and stamp."""
        self.broken: Exception | None = None
        """What went wrong while the server was changed; its state is not to be trusted then."""
        self.answers = Answers(holds_farewell=holds_farewell)
        """Who waits for a reply."""
        self.format = push_format or PushFormat(
            params=Layout({"params": server.params}),
            buffers=Layout(server.buffers.average),
            dtype=server.params.dtype,
            vectors=server.rule.VECTORS_PUSHED,
        )

    # ------------------------------------------------------------------------------------------------- called by the door

    def admit(self, hello: Mapping[str, Any]) -> Seat:
        """Seat a process; the one that it replaces loses its seat.

        Raises:
            ValueError: what it says of itself is not in order; `RunEnded` where no more work is to come.
        """
        wanted, process, host, post = (hello.get(name) for name in ("wanted", "process", "host", "post"))
        number = wanted is None or (isinstance(wanted, int) and not isinstance(wanted, bool) and 0 <= wanted < LARGEST_WORKER)
        if not (number and isinstance(process, int) and isinstance(host, str) and isinstance(post, str)):
            raise ValueError("hello: got other fields than expected: wanted (a number), process, host, post")
        with self.lock:
            former = self.seats.holder(wanted, post)
        if former is not None:
            self.lost(former, "it was replaced")
        with self.lock:
            if self.server.ended:
                raise RunEnded("the run has ended")
            return self.seats.take(wanted, process, host[:64], post[:64])

    def lost(self, seat: Seat, reason: str) -> None:
        """Evict a worker: its ticket is issued again to another one, and nobody waits for it any more."""
        due: list[Due] = []
        with self.lock:
            if seat.token not in self.seats.by_token:
                return  # it has said goodbye, or was evicted before
            ledger = self.server.ledger
            held = [ledger.outstanding[ticket] for ticket in ledger.holding.get(seat.worker, ())] if seat.joined else []
            where = [{"ticket": issue.ticket, "stamp": issue.stamp} for issue in held]
            due = self._evict(seat, Rejoin(f"worker {seat.worker} was evicted: {reason}; rejoin"))
            if not self.server.ended:
                self._note_loss(seat, reason, where)
                held_words = "; ".join(f"ticket {h['ticket']} of stamp {h['stamp']} is issued again" for h in where)
                _log.warning("%s is lost: %s; %s", seat, reason, held_words or "it held no ticket")
        self._settle(due)

    def release(self, seat: Seat) -> None:
        """Let a worker leave: at once where it waits for work, else when it pushes the ticket that it holds."""
        due: list[Due] = []
        with self.lock:
            if seat.token not in self.seats.by_token:
                return
            seat.leaving = True
            if seat.worker not in self.server.ledger.holding:
                due = self._dismiss(seat)
        self._settle(due)

    # --------------------------------------------------------------------------- called for workers, and by the server itself

    def ready(self, token: str) -> Promise:
        """Say that a worker is ready: it is a member from now on, and its first reply comes when there is work.

        A repeated call takes the place of the former, and gets the same reply.

        Raises:
            Rejoin: the seat of this token is taken away.
        """
        promise = Promise()
        due: list[Due] = []
        with self.lock:
            seat = self._seat(token)
            due = self.answers.expect(seat.worker, promise)
            if seat.joined:
                reply = self.server.members[seat.worker].reply
                due += self.answers.due([] if reply is None else [reply])
            elif self.started.is_set():
                due += self._join(seat)
            elif seat not in self.arrived:
                self.arrived.append(seat)
                if self._complete():
                    due += self._begin()
        self._settle(due)
        return promise

    def begin(self) -> None:
        """Start with those who are there, without waiting for the others, if there is anybody."""
        due: list[Due] = []
        with self.lock:
            if self.arrived and not self.started.is_set():
                due = self._begin()
        self._settle(due)

    def expect_without(self, worker: int) -> None:
        """Do not wait for a worker any more before the start."""
        due: list[Due] = []
        with self.lock:
            self.expected.discard(worker)
            if self._complete() and not self.started.is_set():
                due = self._begin()
        self._settle(due)

    def say_farewell(self) -> None:
        """Tell all who wait for it that the run has ended."""
        with self.lock:
            self.answers.holds_farewell = False
            replies = [member.reply for member in self.server.members.values()]
            due = self.answers.due([reply for reply in replies if reply is not None and reply.ticket is None])
        self._settle(due)

    def receive(
        self, token: str, ticket: int, stamp: int, incarnation: int, loss: float | None, samples: int, payload: Tensor
    ) -> Promise:
        """Deliver the gradient of a ticket; the next reply is the answer.

        Where it fails by no fault of its sender, the promise stays open, as the server is about to end.

        Args:
            token: That of the worker's seat.
            ticket: See `Push`, as for the following ones.
            stamp: Likewise.
            incarnation: Likewise.
            loss: Likewise.
            samples: Likewise.
            payload: The wire form, as bytes; where that is exact, gradient and batch-norm statistics as one flat tensor.

        Raises:
            Rejoin: the seat of this token is taken away.
            Dismissed: this worker's gradients are not finite, again and again.
            PushRefused: as `ParameterServer.receive`.
        """
        return self.take(token, ticket, stamp, incarnation, loss, samples, self.format.unpack(self.format.bytes_of(payload)))

    def take(
        self,
        token: str,
        ticket: int,
        stamp: int,
        incarnation: int,
        loss: float | None,
        samples: int,
        parts: tuple[Tensor, Mapping[str, Tensor]],
    ) -> Promise:
        """The same, where gradient and batch-norm statistics are apart already: ``parts``, as `PushFormat.unpack` has them."""
        seat = self._seat(token)  # looked at again under the lock
        grad, buffers = parts
        push = Push(
            worker=seat.worker,
            ticket=ticket,
            stamp=stamp,
            grad=grad,
            loss=loss,
            samples=samples,
            buffers=buffers,
            incarnation=incarnation,
        )
        try:
            checked = self.server.check(push)
        except NonFiniteGradient:
            checked = None
        promise = Promise()
        asked = time.perf_counter()
        with self.lock:
            taken = time.perf_counter()
            self._seat(token)  # it may have been evicted in the meantime
            due = self._take(seat, push, checked, promise)
            self.lock_wait_seconds += taken - asked
            self.lock_held_seconds += time.perf_counter() - taken
        self._settle(due)
        return promise

    def part(self, token: str) -> None:
        """A worker that was told to stop is leaving. Who says it before the end has not been told to stop, and is lost."""
        with self.lock:
            seat = self.seats.by_token.get(token)
            if seat is not None and self.server.ended:
                self.seats.free(seat)
                self.changed.set()
                return
        if seat is not None:
            self.lost(seat, "it said goodbye before the end")

    def call(self, change: Callable[[ParameterServer], list[Reply]]) -> None:
        """Change the server from outside of a push, and send the replies that this makes due."""
        with self.lock:
            due = self.answers.due(change(self.server))
        self._settle(due)

    def finish(self) -> None:
        """Hand out no further ticket."""

        def finish(server: ParameterServer) -> list[Reply]:
            replies = server.finish()
            self.journal.finish()
            return replies

        self.call(finish)

    def evict_late(self, patience_seconds: float) -> None:
        """Evict workers that have held a ticket for longer than that."""
        if not self.started.is_set():
            return
        with self.lock:
            late = self.answers.late(self.server.ledger.holding, patience_seconds)
            seats = [self.seats.by_worker[worker] for worker in late if worker in self.seats.by_worker]
        for seat in seats:
            self.lost(seat, f"no push for runtime.ticket_timeout_seconds={patience_seconds:g}, stuck or too slow for it")

    # ---------------------------------------------------------------------------------------------------- under the lock

    def _seat(self, token: str) -> Seat:
        """The seat of a token; also without the lock, for what is looked at again under it."""
        seat = self.seats.by_token.get(token) if type(token) is str else None
        if seat is None:
            raise Rejoin("this worker's seat is taken away: it was evicted, or the server has restarted; rejoin")
        return seat

    def _take(self, seat: Seat, push: Push, checked: Checked | None, promise: Promise) -> list[Due]:
        """Apply a push that was checked, or settle one that is not finite (``checked`` of None)."""
        if self.broken is not None:
            return []
        journal = NoJournal() if self.server.ended else self.journal  # which is closed soon after the end
        try:
            replies = self.server.reject(push) if checked is None else self.server.redeem(push, checked)
            journal.push(push, rejected=checked is None)
            self.observe(self.server)
        except PushRefused:
            raise
        except Exception as error:
            self.broken = error
            return []
        due = self.answers.expect(seat.worker, promise) + self.answers.due(replies)
        seat.not_finite = seat.not_finite + 1 if checked is None else 0
        if seat.not_finite >= self.max_not_finite and len(self.server.members) > 1:
            reason = f"{seat.not_finite} gradients in a row were not finite (runtime.max_not_finite)"
            self._note_loss(seat, reason, [])
            _log.warning("%s is dismissed: %s", seat, reason)
            return without(due, promise) + self._evict(seat, Dismissed(f"worker {seat.worker}: {reason}"), promise)
        if seat.leaving:
            return without(due, promise) + self._dismiss(seat, promise)
        return due

    def _complete(self) -> bool:
        return bool(self.arrived) and {each.worker for each in self.arrived} >= self.expected

    def _begin(self) -> list[Due]:
        """A life of the server begins."""
        self.on_start()
        arrived, self.arrived = self.arrived, []
        ours = [seat for seat in arrived if seat.worker < self.server.num_workers]
        for seat in ours:
            seat.joined = True
        workers = sorted(seat.worker for seat in ours)
        replies = self.server.start(workers)
        self.journal.start(workers, self.server.incarnation)
        self.started.set()
        self.changed.set()
        due = self.answers.due(replies)
        for guest in arrived:
            if not guest.joined:
                due += self._join(guest)
        return due

    def _join(self, seat: Seat) -> list[Due]:
        seat.joined = True
        replies = self.server.join(seat.worker)
        self.journal.join(seat.worker)
        self.changed.set()
        _log.info("%s has joined", seat)
        return self.answers.due(replies)

    def _evict(self, seat: Seat, answer: Reply | Exception, promise: Promise | None = None) -> list[Due]:
        """Take a seat away; who still waits for a reply gets this answer."""
        self.seats.free(seat)
        self.changed.set()
        if seat in self.arrived:
            self.arrived.remove(seat)
        promise = self.answers.close(seat.worker) or promise
        due: list[Due] = [] if promise is None else [(promise, answer)]
        if not seat.joined:
            return due
        journal = NoJournal() if self.server.ended else self.journal
        replies = self.server.leave(seat.worker)
        journal.leave(seat.worker)
        self.observe(self.server)
        return due + self.answers.due(replies)

    def _dismiss(self, seat: Seat, promise: Promise | None = None) -> list[Due]:
        """Let a worker go that wants to leave: it is answered as at the end of the run."""
        stop = Reply(
            worker=seat.worker,
            ticket=None,
            stamp=self.server.iteration,
            params=torch.empty(0),
            lr=0.0,
            steps=1,
            incarnation=self.server.incarnation,
        )
        _log.info("%s leaves", seat)
        return self._evict(seat, stop, promise)

    def _note_loss(self, seat: Seat, reason: str, held: list[dict[str, int]]) -> None:
        where = {"worker": seat.worker, "process": seat.process, "host": seat.host}
        self.losses.append({**where, "reason": reason, "held": held})

    # ------------------------------------------------------------------------------------------------- without the lock

    def _settle(self, due: Iterable[Due]) -> None:
        """Keep promises, as soon as what they acknowledge is durable."""
        due = list(due)
        try:
            if due:
                self.journal.sync()
        except OSError as error:  # what is not durable is not acknowledged
            self.broken = error
            return
        send(due)
