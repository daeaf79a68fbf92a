"""The server's side of the wire: takes a push, holds the lock for the step, and answers by futures (`answers`).

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
from ormo_rpc.errors import PushRefused, RunEnded, StaleSession, WorkerBanned
from ormo_rpc.messages import Push, Reply
from ormo_rpc.models.flat import Layout
from ormo_rpc.rendezvous.memberships import Membership, Memberships
from ormo_rpc.rendezvous.protocol import JoinRequest
from ormo_rpc.server.parameter_server import ParameterServer
from ormo_rpc.server.validation import ValidatedPush
from ormo_rpc.storage.journal import Journal, NoJournal
from ormo_rpc.transports.pending_replies import Due, PendingReplies, ReplyFuture, send, without

_log = logging.getLogger(__name__)


class Service:
    """What workers reach, and the handler of its memberships.

    `lock` guards the parameter server with all that belongs to it: memberships, arrived, evictions, journal, answers, and the times
    measured here. `broken` is never cleared, so it is read without. Payload checks run before the lock is taken; it is released
    before the journal is forced to disk, and replies are sent last.

    Args:
        server: The parameter server.
        observe: Called under the lock after everything that changed something; it must be quick.
        on_start: Called under the lock right before the first ticket is handed out.
        journal: Told, under the lock, of everything that changes the server.
        push_format: The wire form of pushes; exact by default.
        max_not_finite: After how many gradients in a row that are not finite a worker is dismissed.
        defer_shutdown: Whether the word to stop is held back until `release_shutdown`, so that nobody is gone before all is kept.
    """

    def __init__(
        self,
        server: ParameterServer,
        observe: Callable[[ParameterServer], None],
        on_start: Callable[[], None] = lambda: None,
        *,
        journal: Journal | None = None,
        push_format: PushFormat | None = None,
        max_not_finite: int = 10,
        defer_shutdown: bool = False,
    ) -> None:
        self.server = server
        self.observe = observe
        self.on_start = on_start
        self.journal: Journal = journal or NoJournal()
        self.max_not_finite = max_not_finite
        self.expected = set(range(server.num_workers))
        """Who has to be ready before a first life of the server begins."""
        self.lock = threading.Lock()
        self.lock_wait_seconds = 0.0
        self.lock_held_seconds = 0.0
        self.memberships = Memberships(server.num_workers)
        self.arrived: list[Membership] = []
        """Who is ready to work and waits for the start."""
        self.started = threading.Event()
        self.changed = threading.Event()
        """Somebody has come or gone."""
        self.evictions: list[dict[str, Any]] = []
        """Every worker that was lost, with its last ticket and stamp."""
        self.broken: Exception | None = None
        """What went wrong while the server was changed; its state is not to be trusted then."""
        self.pending = PendingReplies(defer_shutdown=defer_shutdown)
        """Who waits for a reply."""
        self.format = push_format or PushFormat(
            params=Layout({"params": server.params}),
            buffers=Layout(server.buffers.average),
            dtype=server.params.dtype,
            vectors=server.algorithm.VECTORS_PUSHED,
        )

    # ------------------------------------------------------------------------------------------------- called by the listener

    def join(self, request: JoinRequest) -> Membership:
        """Give a process a membership, and evict the process that it replaces.

        Raises:
            RunEnded: the run is over.
        """
        with self.lock:
            former = self.memberships.replaced_by(request.preferred_worker, request.slot_id)
        if former is not None:
            self.evict(former, "it was replaced")
        with self.lock:
            if self.server.ended:
                raise RunEnded("the run has ended")
            return self.memberships.add(request.preferred_worker, request.pid, request.host, request.slot_id)

    def evict(self, membership: Membership, reason: str) -> None:
        """Evict a worker: its ticket is issued again to another one, and nobody waits for it any more."""
        due: list[Due] = []
        with self.lock:
            if membership.session_id not in self.memberships.by_session:
                return  # it has said goodbye, or was evicted before
            assignments = self.server.assignments
            held = (
                [assignments.outstanding[ticket] for ticket in assignments.holding.get(membership.worker, ())]
                if membership.joined
                else []
            )
            where = [{"ticket": issue.ticket, "stamp": issue.stamp} for issue in held]
            due = self._remove(membership, StaleSession(f"worker {membership.worker} was evicted: {reason}; rejoin"))
            if not self.server.ended:
                self._record_eviction(membership, reason, where)
                held_words = "; ".join(f"ticket {h['ticket']} of stamp {h['stamp']} will be reissued" for h in where)
                _log.warning("%s was evicted: %s; %s", membership, reason, held_words or "it held no ticket")
        self._settle(due)

    def request_leave(self, membership: Membership) -> None:
        """Let a worker leave: at once where it waits for work, else when it pushes the ticket that it holds."""
        due: list[Due] = []
        with self.lock:
            if membership.session_id not in self.memberships.by_session:
                return
            membership.leaving = True
            if membership.worker not in self.server.assignments.holding:
                due = self._release(membership)
        self._settle(due)

    # --------------------------------------------------------------------------- called for workers, and by the server itself

    def register(self, session_id: str) -> ReplyFuture:
        """Say that a worker is ready: it is a member from now on, and its first reply comes when there is work.

        A repeated call takes the place of the former, and gets the same reply.

        Raises:
            StaleSession: the membership of this session_id is taken away.
        """
        future = ReplyFuture()
        due: list[Due] = []
        with self.lock:
            membership = self._membership(session_id)
            due = self.pending.expect(membership.worker, future)
            if membership.joined:
                reply = self.server.members[membership.worker].reply
                due += self.pending.due([] if reply is None else [reply])
            elif self.started.is_set():
                due += self._join(membership)
            elif membership not in self.arrived:
                self.arrived.append(membership)
                if self._complete():
                    due += self._begin()
        self._settle(due)
        return future

    def start(self) -> None:
        """Start with those who are there, without waiting for the others, if there is anybody."""
        due: list[Due] = []
        with self.lock:
            if self.arrived and not self.started.is_set():
                due = self._begin()
        self._settle(due)

    def stop_waiting_for(self, worker: int) -> None:
        """Do not wait for a worker any more before the start."""
        due: list[Due] = []
        with self.lock:
            self.expected.discard(worker)
            if self._complete() and not self.started.is_set():
                due = self._begin()
        self._settle(due)

    def release_shutdown(self) -> None:
        """Tell all who wait for it that the run has ended."""
        with self.lock:
            self.pending.defer_shutdown = False
            replies = [member.reply for member in self.server.members.values()]
            due = self.pending.due([reply for reply in replies if reply is not None and reply.ticket is None])
        self._settle(due)

    def receive(
        self, session_id: str, ticket: int, stamp: int, incarnation: int, loss: float | None, samples: int, payload: Tensor
    ) -> ReplyFuture:
        """Deliver the gradient of a ticket; the next reply is the answer.

        Where it fails by no fault of its sender, the future stays open, as the server is about to end.

        Args:
            session_id: That of the worker's membership.
            ticket: See `Push`, as for the following ones.
            stamp: Likewise.
            incarnation: Likewise.
            loss: Likewise.
            samples: Likewise.
            payload: The wire form, as bytes; where that is exact, gradient and batch-norm statistics as one flat tensor.

        Raises:
            StaleSession: the membership of this session_id is taken away.
            WorkerBanned: this worker's gradients are not finite, again and again.
            PushRefused: as `ParameterServer.receive`.
        """
        return self.take(
            session_id, ticket, stamp, incarnation, loss, samples, self.format.unpack(self.format.bytes_of(payload))
        )

    def take(
        self,
        session_id: str,
        ticket: int,
        stamp: int,
        incarnation: int,
        loss: float | None,
        samples: int,
        parts: tuple[Tensor, Mapping[str, Tensor]],
    ) -> ReplyFuture:
        """The same, where gradient and batch-norm statistics are apart already: ``parts``, as `PushFormat.unpack` has them."""
        membership = self._membership(session_id)  # looked at again under the lock
        grad, buffers = parts
        push = Push(
            worker=membership.worker,
            ticket=ticket,
            stamp=stamp,
            grad=grad,
            loss=loss,
            samples=samples,
            buffers=buffers,
            incarnation=incarnation,
        )
        validated = self.server.validate(push)
        future = ReplyFuture()
        asked = time.perf_counter()
        with self.lock:
            taken = time.perf_counter()
            self._membership(session_id)  # it may have been evicted in the meantime
            due = self._take(membership, push, validated, future)
            self.lock_wait_seconds += taken - asked
            self.lock_held_seconds += time.perf_counter() - taken
        self._settle(due)
        return future

    def leave(self, session_id: str) -> None:
        """A worker that was told to stop is leaving. Who says it before the end has not been told to stop, and is lost."""
        with self.lock:
            membership = self.memberships.by_session.get(session_id)
            if membership is not None and self.server.ended:
                self.memberships.remove(membership)
                self.changed.set()
                return
        if membership is not None:
            self.evict(membership, "it left before the end without being told to")

    def call(self, change: Callable[[ParameterServer], list[Reply]]) -> None:
        """Change the server from outside of a push, and send the replies that this makes due."""
        with self.lock:
            due = self.pending.due(change(self.server))
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
            late = self.pending.late(self.server.assignments.holding, patience_seconds)
            memberships = [self.memberships.by_worker[worker] for worker in late if worker in self.memberships.by_worker]
        for membership in memberships:
            self.evict(membership, f"no push for runtime.ticket_timeout_seconds={patience_seconds:g}, stuck or too slow for it")

    # ---------------------------------------------------------------------------------------------------- under the lock

    def _membership(self, session_id: str) -> Membership:
        """The membership of a session_id; also without the lock, for what is looked at again under it."""
        membership = self.memberships.by_session.get(session_id) if type(session_id) is str else None
        if membership is None:
            raise StaleSession("this worker's membership is taken away: it was evicted, or the server has restarted; rejoin")
        return membership

    def _take(self, membership: Membership, push: Push, validated: ValidatedPush, future: ReplyFuture) -> list[Due]:
        """Settle a validated push; return what is due."""
        if self.broken is not None:
            return []
        journal = NoJournal() if self.server.ended else self.journal  # which is closed soon after the end
        try:
            replies = self.server.commit(push, validated)
            journal.push(push, rejected=validated.rejected is not None)
            self.observe(self.server)
        except PushRefused:
            raise
        except Exception as error:
            self.broken = error
            return []
        due = self.pending.expect(membership.worker, future) + self.pending.due(replies)
        membership.not_finite = membership.not_finite + 1 if validated.rejected is not None else 0
        if membership.not_finite >= self.max_not_finite and len(self.server.members) > 1:
            reason = f"{membership.not_finite} gradients in a row were not finite (runtime.max_not_finite)"
            self._record_eviction(membership, reason, [])
            _log.warning("%s was banned: %s", membership, reason)
            return without(due, future) + self._remove(
                membership, WorkerBanned(f"worker {membership.worker}: {reason}"), future
            )
        if membership.leaving:
            return without(due, future) + self._release(membership, future)
        return due

    def _complete(self) -> bool:
        return bool(self.arrived) and {each.worker for each in self.arrived} >= self.expected

    def _begin(self) -> list[Due]:
        """A life of the server begins."""
        self.on_start()
        arrived, self.arrived = self.arrived, []
        ours = [membership for membership in arrived if membership.worker < self.server.num_workers]
        for membership in ours:
            membership.joined = True
        workers = sorted(membership.worker for membership in ours)
        replies = self.server.start(workers)
        self.journal.start(workers, self.server.incarnation)
        self.started.set()
        self.changed.set()
        due = self.pending.due(replies)
        for guest in arrived:
            if not guest.joined:
                due += self._join(guest)
        return due

    def _join(self, membership: Membership) -> list[Due]:
        membership.joined = True
        replies = self.server.join(membership.worker)
        self.journal.join(membership.worker)
        self.changed.set()
        _log.info("%s joined", membership)
        return self.pending.due(replies)

    def _remove(self, membership: Membership, answer: Reply | Exception, future: ReplyFuture | None = None) -> list[Due]:
        """Take a membership away; who still waits for a reply gets this answer."""
        self.memberships.remove(membership)
        self.changed.set()
        if membership in self.arrived:
            self.arrived.remove(membership)
        future = self.pending.close(membership.worker) or future
        due: list[Due] = [] if future is None else [(future, answer)]
        if not membership.joined:
            return due
        journal = NoJournal() if self.server.ended else self.journal
        replies = self.server.leave(membership.worker)
        journal.leave(membership.worker)
        self.observe(self.server)
        return due + self.pending.due(replies)

    def _release(self, membership: Membership, future: ReplyFuture | None = None) -> list[Due]:
        """Let a worker go that wants to leave: it is answered as at the end of the run."""
        stop = Reply(
            worker=membership.worker,
            ticket=None,
            stamp=self.server.iteration,
            params=torch.empty(0),
            lr=0.0,
            steps=1,
            incarnation=self.server.incarnation,
        )
        _log.info("%s left", membership)
        return self._remove(membership, stop, future)

    def _record_eviction(self, membership: Membership, reason: str, held: list[dict[str, int]]) -> None:
        where = {"worker": membership.worker, "process": membership.pid, "host": membership.host}
        self.evictions.append({**where, "reason": reason, "held": held})

    # ------------------------------------------------------------------------------------------------- without the lock

    def _settle(self, due: Iterable[Due]) -> None:
        """Keep futures, as soon as what they acknowledge is durable."""
        due = list(due)
        try:
            if due:
                self.journal.sync()
        except OSError as error:  # what is not durable is not acknowledged
            self.broken = error
            return
        send(due)
