"""The service: the lock around the parameter server, taken for each push and each change of the memberships.

`transports` bring the calls of workers here; `control` those about memberships.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ormo_rpc.compression import PushFormat
from ormo_rpc.control.memberships import Membership, Memberships
from ormo_rpc.control.messages import JoinRequest
from ormo_rpc.errors import GradientOverflow, PushRefused, RunEnded, StaleSession, WorkerBanned
from ormo_rpc.kernels.host_copies import on_host
from ormo_rpc.messages import Push, Reply
from ormo_rpc.models.flat import Layout
from ormo_rpc.runtimes.distributed.server_process.gpu_memory import GpuSide
from ormo_rpc.runtimes.distributed.server_process.start_barrier import StartBarrier
from ormo_rpc.server.parameter_server import ParameterServer
from ormo_rpc.server.validation import ValidatedPush
from ormo_rpc.storage.journal import Journal, NoJournal
from ormo_rpc.transports.base import ReplySize
from ormo_rpc.transports.pending_replies import Due, PendingReplies, ReplyFuture, complete, without

_log = logging.getLogger(__name__)


class Service:
    """Applies pushes, and decides about memberships; `transports.base.Service` and `control.base.ControlHandler`.

    `lock` guards the parameter server with all that belongs to it: memberships, barrier, transports, evictions, journal,
    pending replies, and the times measured here. `failure` is never cleared, so it is read without. Pushes are validated before
    the lock is taken; it is released before the journal is forced to disk, and replies are sent last.

    Args:
        server: The parameter server.
        observe: Called under the lock after every change; it must be quick.
        on_start: Called under the lock right before the first ticket is handed out.
        journal: Records, under the lock, every call that changes the server.
        push_format: The wire form of pushes; exact by default.
        max_not_finite: A worker is banned after this many consecutive gradients that are not finite.
        defer_shutdown: Hold the replies that end workers back until `release_shutdown`, so that no worker ends before the
            last checkpoint is written.
        gpu: The streams of a server whose parameters are on a GPU.

    Attributes:
        device: That of the parameters.
        changed: Set whenever a membership begins or ends, or a worker connects.
        on_ended: Called without the lock with each session that has ended.
        transports: The transport that carries each worker's pushes, and the reason why, also of workers that have left.
        evictions: Every worker that was evicted, with the tickets that it held.
        failure: The error that ended a change of the server half-way; its state is not to be trusted then.
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
        gpu: GpuSide | None = None,
    ) -> None:
        self.server = server
        self.device = server.device
        self._gpu = gpu
        self.observe = observe
        self.on_start = on_start
        self.journal: Journal = journal or NoJournal()
        self.rereads_pushes = self.journal.durable
        self.max_not_finite = max_not_finite
        self.lock = threading.Lock()
        self.lock_wait_seconds = 0.0
        self.lock_held_seconds = 0.0
        self.memberships = Memberships(server.num_workers)
        self.barrier = StartBarrier(server.num_workers)
        self.changed = threading.Event()
        self.on_ended: Callable[[str], None] = lambda _: None
        self.transports: dict[int, dict[str, str]] = {}
        self._ended = collections.deque[str]()
        """Sessions that have ended, for `on_ended`; threads take from it without the lock."""
        self.evictions: list[dict[str, Any]] = []
        self.failure: Exception | None = None
        self.pending = PendingReplies(defer_shutdown=defer_shutdown)
        self.push_format = push_format or PushFormat(
            params=Layout({"params": server.params}),
            buffers=server.buffers.layout,
            dtype=server.params.dtype,
            vectors=server.algorithm.VECTORS_PUSHED,
        )
        self.reply_size = ReplySize(
            params=server.algorithm.VECTORS_SENT * server.params.numel() * server.params.itemsize,
            buffers=server.buffers.snapshot().numel(),
        )

    # ---------------------------------------------------------------------------------------- called by the control plane

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
        """End a membership: its tickets are issued again to other workers, which no longer wait for it."""
        due: list[Due] = []
        with self.lock:
            if membership.session_id not in self.memberships.by_session:
                return  # it has left, or was evicted before
            assignments, held = self.server.assignments, list[dict[str, int]]()
            if membership.joined:
                tickets = assignments.holding.get(membership.worker, ())
                issued = [assignments.outstanding[ticket] for ticket in tickets]
                held = [{"ticket": assignment.ticket, "stamp": assignment.stamp} for assignment in issued]
            due = self._end_membership(membership, StaleSession(f"worker {membership.worker} was evicted: {reason}; rejoin"))
            if not self.server.ended:
                self._record_eviction(membership, reason, held)
                reissued = "; ".join(f"ticket {h['ticket']} of stamp {h['stamp']} will be reissued" for h in held)
                _log.warning("%s was evicted: %s; %s", membership, reason, reissued or "it held no ticket")
        self._complete(due)

    def request_leave(self, membership: Membership) -> None:
        """Let a worker leave: at once where it waits for work, else when it pushes the ticket that it holds."""
        due: list[Due] = []
        with self.lock:
            if membership.session_id not in self.memberships.by_session:
                return
            membership.leaving = True
            if membership.worker not in self.server.assignments.holding:
                due = self._leave(membership)
        self._complete(due)

    # ------------------------------------------------------------------------------------------- called by the transports

    def is_member(self, session_id: str) -> bool:
        """Tell whether a session is valid."""
        return session_id in self.memberships.by_session

    def connected(self, session_id: str, transport: str, reason: str) -> None:
        """Take note of the transport that carries a worker's pushes from now on, and of the reason why it is that one."""
        with self.lock:
            membership = self.memberships.by_session.get(session_id)
            if membership is None:
                return
            self.transports[membership.worker] = {"transport": transport, "reason": reason}
            self.changed.set()
        _log.info("%s pushes by %s: %s", membership, transport, reason)

    def register(self, session_id: str) -> ReplyFuture:
        """Make a worker available for work; the future is its first reply.

        A repeated call takes the place of the former, and gets the same reply.

        Raises:
            StaleSession: the session is not valid.
        """
        future = ReplyFuture()
        due: list[Due] = []
        with self.lock:
            membership = self._membership(session_id)
            due = self.pending.expect(membership.worker, future)
            if membership.joined:
                reply = self.server.members[membership.worker].reply
                due += self.pending.due([] if reply is None else [reply])
            elif self.barrier.passed.is_set():
                due += self._join(membership)
            else:
                self.barrier.add(membership)
                due += self._start() if self.barrier.complete else []
        self._complete(due)
        return future

    def push(self, session_id: str, push: Push) -> ReplyFuture:
        """Apply a push; the future is the sender's next reply.

        Where it fails by no fault of its sender, the future stays open, as the server is about to end.

        Raises:
            StaleSession: the session is not valid.
            WorkerBanned: this is the last of ``max_not_finite`` consecutive gradients of the worker that are not finite.
            PushRefused: as `ParameterServer.receive`.
        """
        membership = self._membership(session_id)  # checked again under the lock
        if push.worker != membership.worker:
            raise PushRefused(f"push: worker: got {push.worker!r}, expected {membership.worker}, the session's")
        validate = functools.partial(self.server.validate, push)
        validated = validate() if self._gpu is None else self._gpu.validated(validate)
        future = ReplyFuture()
        asked = time.perf_counter()
        with self.lock:
            taken = time.perf_counter()
            self._membership(session_id)  # it may have been evicted in the meantime
            due = self._apply(membership, push, validated, future)
            self.lock_wait_seconds += taken - asked
            self.lock_held_seconds += time.perf_counter() - taken
        self._complete(due)
        return future

    def on_host(self, reply: Reply) -> Reply:
        """Return a reply with its tensors on the CPU; those of one without work are not read."""
        return reply if self._gpu is None or reply.ticket is None else self._gpu.on_host(reply)

    def leave(self, session_id: str) -> None:
        """End a membership at the end of the run; before it, the worker is evicted."""
        with self.lock:
            membership = self.memberships.by_session.get(session_id)
            ended = self.server.ended
            if membership is not None and ended:
                self.memberships.remove(membership)
                self._ended.append(session_id)
                self.changed.set()
        if ended:
            self._complete([])
        elif membership is not None:
            self.evict(membership, "it left before the end without being asked to")

    def present_state(self) -> tuple[int, torch.Tensor, torch.Tensor]:
        """Return iteration, parameters to evaluate and bytes of the buffers as they are now, in memory that never changes."""
        with self.lock:
            state = self.server.iteration, self.server.evaluated(), self.server.buffers.snapshot()
        return on_host(state)

    # ------------------------------------------------------------------------------------- called by the server's process

    def start(self) -> None:
        """Start with the workers that have registered, if there are any, without waiting for the others."""
        due: list[Due] = []
        with self.lock:
            if self.barrier.registered and not self.barrier.passed.is_set():
                due = self._start()
        self._complete(due)

    def stop_expecting(self, worker: int) -> None:
        """Start without a worker, as soon as the others have registered."""
        due: list[Due] = []
        with self.lock:
            self.barrier.stop_expecting(worker)
            if self.barrier.complete and not self.barrier.passed.is_set():
                due = self._start()
        self._complete(due)

    def change(self, change: Callable[[ParameterServer], list[Reply]]) -> None:
        """Change the server otherwise than by a push, and send the replies that become due."""
        with self.lock:
            due = self.pending.due(change(self.server))
        self._complete(due)

    def finish(self) -> None:
        """Hand out no further ticket."""

        def finish(server: ParameterServer) -> list[Reply]:
            replies = server.finish()
            self.journal.finish()
            return replies

        self.change(finish)

    def release_shutdown(self) -> None:
        """Send the replies that end workers."""
        with self.lock:
            self.pending.defer_shutdown = False
            replies = [member.reply for member in self.server.members.values()]
            due = self.pending.due([reply for reply in replies if reply is not None and reply.ticket is None])
        self._complete(due)

    def evict_late(self, timeout_seconds: float) -> None:
        """Evict workers that have held a ticket for longer than that."""
        if not self.barrier.passed.is_set():
            return
        with self.lock:
            late = self.pending.late(self.server.assignments.holding, timeout_seconds)
            memberships = [self.memberships.by_worker[worker] for worker in late if worker in self.memberships.by_worker]
        for membership in memberships:
            self.evict(membership, f"no push for runtime.ticket_timeout_seconds={timeout_seconds:g}, stuck or too slow for it")

    # ------------------------------------------------------------------------------------------------------ under the lock

    def _membership(self, session_id: str) -> Membership:
        """The membership of a session; also without the lock, where it is checked again under it."""
        membership = self.memberships.by_session.get(session_id) if type(session_id) is str else None
        if membership is None:
            raise StaleSession("this session is not valid: its worker was evicted, or the server has restarted; rejoin")
        return membership

    def _apply(self, membership: Membership, push: Push, validated: ValidatedPush, future: ReplyFuture) -> list[Due]:
        """Settle a validated push."""
        if self.failure is not None:
            return []
        journal = NoJournal() if self.server.ended else self.journal  # closed soon after the end
        try:
            replies = self.server.commit(push, validated)
            overflow = isinstance(validated.rejected, GradientOverflow)
            journal.push(push, rejected=validated.rejected is not None, overflow=overflow)
            self.observe(self.server)
        except PushRefused:
            raise
        except Exception as error:
            self.failure = error
            return []
        due = self.pending.expect(membership.worker, future) + self.pending.due(replies)
        if not overflow:  # for which the loss scale is to blame
            membership.not_finite = membership.not_finite + 1 if validated.rejected is not None else 0
        if membership.not_finite >= self.max_not_finite and len(self.server.members) > 1:
            reason = f"{membership.not_finite} gradients in a row were not finite (runtime.max_not_finite)"
            self._record_eviction(membership, reason, [])
            _log.warning("%s was banned: %s", membership, reason)
            banned = WorkerBanned(f"worker {membership.worker}: {reason}")
            return without(due, future) + self._end_membership(membership, banned, future)
        if membership.leaving:
            return without(due, future) + self._leave(membership, future)
        return due

    def _start(self) -> list[Due]:
        """Hand out the first tickets of this incarnation of the server."""
        self.on_start()
        registered = self.barrier.take()
        initial = [membership for membership in registered if membership.worker < self.server.num_workers]
        for membership in initial:
            membership.joined = True
        workers = sorted(membership.worker for membership in initial)
        try:
            replies = self.server.start(workers)
        except Exception as error:  # of the algorithm or scheduler
            self.failure = error
            self.barrier.passed.set()
            return []
        self.journal.start(workers, self.server.incarnation)
        self.barrier.passed.set()
        self.changed.set()
        due = self.pending.due(replies)
        for membership in registered:
            if not membership.joined:  # an elastic worker
                due += self._join(membership)
        return due

    def _join(self, membership: Membership) -> list[Due]:
        membership.joined = True
        replies = self.server.join(membership.worker)
        self.journal.join(membership.worker)
        self.changed.set()
        return self.pending.due(replies)

    def _leave(self, membership: Membership, future: ReplyFuture | None = None) -> list[Due]:
        """Let a worker leave that has asked to: its reply has no ticket."""
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
        return self._end_membership(membership, stop, future)

    def _end_membership(
        self, membership: Membership, outcome: Reply | Exception, future: ReplyFuture | None = None
    ) -> list[Due]:
        """Remove a membership; where its worker waits for a reply, this is the outcome."""
        self.memberships.remove(membership)
        self._ended.append(membership.session_id)
        self.changed.set()
        self.barrier.remove(membership)
        future = self.pending.close(membership.worker) or future
        due: list[Due] = [] if future is None else [(future, outcome)]
        if not membership.joined:
            return due
        journal = NoJournal() if self.server.ended else self.journal
        replies = self.server.leave(membership.worker)
        journal.leave(membership.worker)
        self.observe(self.server)
        return due + self.pending.due(replies)

    def _record_eviction(self, membership: Membership, reason: str, held: list[dict[str, int]]) -> None:
        process = {"worker": membership.worker, "process": membership.pid, "host": membership.host}
        self.evictions.append({**process, "reason": reason, "held": held})

    # --------------------------------------------------------------------------------------------------- without the lock

    def _complete(self, due: Iterable[Due]) -> None:
        """Complete futures, as soon as the changes that they acknowledge are durable."""
        due = list(due)
        try:
            if due:
                self.journal.sync()
        except OSError as error:  # a change that is not durable is not acknowledged
            self.failure = error
            return
        complete(due)
        if self._ended:
            with contextlib.suppress(IndexError):  # other threads take from it, too
                while True:
                    self.on_ended(self._ended.popleft())
