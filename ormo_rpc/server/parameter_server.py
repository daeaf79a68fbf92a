"""The parameter server: assignments of tickets, algorithm and scheduler in one place. Single-threaded by contract."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from torch import Tensor

from ormo_rpc.algorithms.base import PullContext, PushContext
from ormo_rpc.errors import NonFiniteGradient, PushRefused, StaleSession
from ormo_rpc.messages import Push, Reply
from ormo_rpc.server.assignments import Assignment
from ormo_rpc.server.events import Event, Kind
from ormo_rpc.server.state import Member, ServerState, Status
from ormo_rpc.server.validation import NormPolicy, ValidatedPush, all_finite, check_whole, validate_push

FINITE_CHECK_INTERVAL = 64
"""Check the parameters for NaN and infinity every this many updates."""

__all__ = ["ParameterServer", "Status"]


class ParameterServer(ServerState):
    """Hands out tickets, applies each gradient once, and replies to the workers that the scheduler releases.

    A push takes this way: `receive` = `validate` (no lock needed) and `commit`, which matches it to its assignment, applies or
    discards its gradient, and replies to all released workers (`_match`, `_apply` or `_discard`, `_answer`).

    Made by `build_server`. Every public method runs to its end before the next one is called; a runtime with threads holds one
    lock around them. `validate` alone may run beside anything.

    Args:
        algorithm: The algorithm; it owns the parameters.
        scheduler: Decides when a worker gets its next ticket.
        num_workers: Workers 0 to num_workers - 1 are members from the start.
        lr: The scheduled learning rate, a pure function of the iteration.
        total_tickets: T, the number of gradients to apply; None means no end.
        min_workers: While fewer are members, no ticket is handed out; what is outstanding is applied.
        norm_limit: The limit to the norm of a push.
        buffers: The running average of the buffers in the pushes.
        record: Called with each event, in order.
        clock: Seconds since the start of the run.
        timer: Seconds, real ones, for `step_seconds`.
        sent_dtype: The dtype that parameters are rounded to when they are sent; None for no rounding. `PushContext.sent` has
            the rounded values in the dtype of the parameters.
        pushed_dtype: The dtype of pushes, bfloat16 or float16; None for that of the parameters.
        process_of: From a worker to its process, where one has several; see `Assignments`.
    """

    # ------------------------------------------------------------------------------------------------------- membership

    def start(self, workers: Collection[int] | None = None) -> list[Reply]:
        """Begin an incarnation of the server: every worker is handed a ticket at the present parameters.

        Tickets go to the workers in the order of their numbers. After `load_state_dict` this is a new incarnation: tickets that
        were outstanding are issued again, and a push of an older incarnation is answered "rejoin".

        Args:
            workers: The members at the start; others may `join` later. By default, workers 0 to num_workers - 1.
        """
        present = sorted(range(self.num_workers) if workers is None else workers)
        if not self.started and present != list(range(self.num_workers)):
            self._record(Kind.resume, iteration=self.iteration, incarnation=self.incarnation, workers=present)
        if self.started:
            self.incarnation += 1
            for worker in list(self.members):
                self.assignments.revoke(worker)
            self._record(Kind.resume, iteration=self.iteration, incarnation=self.incarnation, workers=present)
            if self.status is Status.diverged and all_finite(self.params) and not self.assignments.done:
                self.status = Status.running  # gradients had gone astray, not the parameters: a lower rate may save them
        self.started = True
        for worker in set(self.members) - set(present):
            self.algorithm.leave(worker)
        self.members = {worker: Member() for worker in present}
        self.scheduler.start(self.members)
        self.blocked, self.idle, self.paused = list(self.members), [], False
        return self._answer()

    def resume_as(self, incarnation: int) -> None:
        """Take the place of a server process that died: `start` begins this incarnation, or a later one that is new."""
        self.incarnation = max(self.incarnation, incarnation - 1)
        self.started = True

    def join(self, worker: int) -> list[Reply]:
        """Take in a worker; K counts it from now on, so buckets opened from now on are larger.

        Raises:
            ValueError: it is a member already, or its number is negative or no whole number.
        """
        check_whole(worker, "join: worker", ValueError)
        if worker in self.members:
            raise ValueError(f"join of worker {worker}: it is a member already; let it leave first, or use another number")
        if worker < 0:
            raise ValueError(f"join: got worker {worker}, expected a number >= 0")
        self.members[worker] = Member()
        self.blocked.append(worker)
        self.scheduler.join(worker)
        self._record(Kind.join, worker=worker, concurrency=self.concurrency)
        return self._answer()

    def leave(self, worker: int) -> list[Reply]:
        """Remove a worker: its tickets are issued again to others, and no barrier waits for it any more.

        Raises:
            ValueError: it is not a member.
        """
        check_whole(worker, "leave: worker", ValueError)
        if worker not in self.members:
            raise ValueError(f"leave of worker {worker}: it is not a member; members are {sorted(self.members)}")
        lost = [assignment.ticket for assignment in self.assignments.revoke(worker)]
        del self.members[worker]
        self.algorithm.leave(worker)
        self.scheduler.leave(worker)
        for queue in (self.blocked, self.idle):
            if worker in queue:
                queue.remove(worker)
        self._record(Kind.leave, worker=worker, concurrency=self.concurrency, tickets=lost)
        return self._answer()

    # ----------------------------------------------------------------------------------------------------------- pushes

    def receive(self, push: Push) -> list[Reply]:
        """Settle a push, and return the replies that are due now: to its sender, to others, or to nobody.

        A gradient that is finite is applied. One that is not is discarded: its ticket goes to another worker, its sender gets
        new work. A push that repeats its sender's newest one is not settled again and gets the identical reply, or none while
        the scheduler holds that reply back.

        Raises:
            PushRefused: the push does not fit; nothing has changed. `StaleSession` is a special case.
        """
        return self.commit(push, self.validate(push))

    def validate(self, push: Push) -> ValidatedPush:
        """Check the payload: the part of `receive` that needs no lock.

        Returns:
            What `commit` settles. Its gradient is of the parameters' dtype, unless the algorithm's step reads that of the wire.

        Raises:
            PushRefused: the payload has the wrong types, shape, dtype or device.
        """
        algorithm = self.algorithm
        try:
            validated = validate_push(
                push, self.params, self.buffers.average, algorithm.VECTORS_PUSHED, self.norm_limit, self.pushed_dtype
            )
        except NonFiniteGradient as error:
            return ValidatedPush(push.grad, math.nan, rejected=error)
        if algorithm.OUT_OF_PLACE or validated.grad.dtype == self.params.dtype:
            return validated
        return replace(validated, grad=validated.grad.to(self.params.dtype))

    def commit(self, push: Push, validated: ValidatedPush) -> list[Reply]:
        """Settle a push: the part of `receive` that changes the server.

        Args:
            push: The push.
            validated: What `validate` returned for it.

        Raises:
            PushRefused: the push does not fit the assignments; nothing has changed.
        """
        member, assignment = self._match(push)
        if assignment is None:
            return self._again(push.worker)
        if validated.rejected is not None:
            self._reject(push, member, assignment)
            return self._settled(push)
        sent = None if member.reply is None else member.reply.params
        if sent is None and self.algorithm.READS_SENT:
            raise StaleSession(
                f"push of worker {push.worker}: what it was sent was lost when the server's state was loaded; rejoin"
            )
        if sent is not None and self.algorithm.READS_SENT:
            sent = sent.to(self.params.dtype)
        member.answered, member.reply = (push.ticket, push.stamp), None
        context = PushContext(
            worker=push.worker,
            ticket=push.ticket,
            iteration=self.iteration,
            stamp=assignment.stamp,
            bucket=assignment.bucket,
            newest_bucket=self.newest_bucket,
            concurrency=self.concurrency,
            lr=self.lr(self.iteration),
            version=assignment.version,
            sent=sent,
        )
        if self.ended:
            self._discard(assignment, validated.grad_sum, reason="the run has ended")
        elif not self.algorithm.accepts(context):
            self._discard(assignment, validated.grad_sum, reason="refused by the algorithm")
        else:
            self._apply(push, assignment, context, validated)
        return self._settled(push)

    def reject(self, push: Push) -> list[Reply]:
        """Settle a push like one whose gradient is not finite, for a caller that knows so without the gradient.

        Raises:
            PushRefused: the push does not fit the assignments; nothing has changed.
        """
        return self.commit(push, ValidatedPush(push.grad, math.nan, rejected=NonFiniteGradient("rejected by the caller")))

    def finish(self) -> list[Reply]:
        """Hand out no further ticket; the run is completed once the outstanding ones are committed."""
        self.assignments.close()
        self._record(Kind.finish, iteration=self.iteration)
        self._end_if_done()
        return self._answer()

    def stop(self) -> list[Reply]:
        """End now: waiting workers are told to stop, the others with their next push, which is not applied."""
        self._end(Status.stopped)
        return self._answer()

    # ---------------------------------------------------------------------------------------------------------- inside

    def _settled(self, push: Push) -> list[Reply]:
        """Have the sender of a settled push wait for its next ticket, and return the replies that are due."""
        self.blocked.append(push.worker)
        self.scheduler.settle(push.worker)
        return self._answer()

    def _reject(self, push: Push, member: Member, assignment: Assignment) -> None:
        """Requeue the ticket of a gradient that is not finite, for a worker of another process.

        When the parameters are not finite either, or the gradient of one ticket is so from workers of two processes (or twice
        from the only one), they are at fault, not the worker, and the run ends as `diverged`.
        """
        member.answered, member.reply = (push.ticket, push.stamp), None
        seen_before = push.ticket in self.assignments.refused_by
        limited = self.norm_limit is not None and self.norm_limit.policy is NormPolicy.refuse
        self._discard(assignment, math.nan, reason="not finite or too large" if limited else "not finite", refused=True)
        if seen_before or not all_finite(self.params):
            self._end(Status.diverged)

    def _match(self, push: Push) -> tuple[Member, Assignment | None]:
        """Return the sender and the assignment that its push answers; None where it is to be dropped: repeated or revoked."""
        sender = f"push of worker {push.worker} for ticket {push.ticket}"
        if push.incarnation != self.incarnation:
            raise StaleSession(
                f"{sender}: incarnation: got {push.incarnation}, expected {self.incarnation}; the server has restarted: rejoin"
            )
        if push.worker not in self.members:
            raise StaleSession(f"{sender}: it is not a member, members are {sorted(self.members)}; join (again) to get work")
        member = self.members[push.worker]
        try:
            assignment = self.assignments.match(push, self.iteration)
        except PushRefused:
            if member.answered != (push.ticket, push.stamp):
                raise
            assignment = None
        if assignment is None and member.answered == (push.ticket, push.stamp):
            self._record(Kind.repeat, worker=push.worker, ticket=push.ticket, stamp=push.stamp)
        elif assignment is None:
            self._record(Kind.discard, worker=push.worker, ticket=push.ticket, stamp=push.stamp, reason="taken away")
        return member, assignment

    def _again(self, worker: int) -> list[Reply]:
        """Return the newest reply once more; nothing while it is pending."""
        reply = self.members[worker].reply
        if reply is not None:
            return [reply]
        if worker not in self.blocked and worker not in self.idle:
            raise StaleSession(f"push of worker {worker}: its newest reply was lost when the server's state was loaded; rejoin")
        return []

    def _apply(self, push: Push, assignment: Assignment, context: PushContext, validated: ValidatedPush) -> None:
        lr = self.algorithm.learning_rate(context)
        began = self.timer()
        self.algorithm.step(validated.grad, lr, context)
        self.step_seconds += self.timer() - began
        self.buffers.update(push.buffers)
        self.assignments.commit(assignment)
        self.iteration += 1
        self.buckets.advance(self.concurrency)
        self.forget_snapshots()
        self._record(
            Kind.apply,
            iteration=context.iteration,
            worker=push.worker,
            ticket=push.ticket,
            stamp=assignment.stamp,
            bucket=assignment.bucket,
            delay=context.delay,
            eta=lr,
            loss=push.loss,
            samples=push.samples,
            grad_sum=validated.grad_sum.hex(),
            **({} if validated.clipped_norm is None else {"clipped_norm": validated.clipped_norm.hex()}),
        )
        # Now and then, as it costs a pass over memory, and NaN neither goes away by itself nor hides: gradients show it, too.
        if self.iteration % FINITE_CHECK_INTERVAL == 0 and not all_finite(self.params):
            self._end(Status.diverged)
        self._end_if_done()

    def _discard(self, assignment: Assignment, grad_sum: float, *, reason: str, refused: bool = False) -> None:
        self.assignments.requeue(assignment, refused=refused)
        self._record(
            Kind.discard,
            worker=assignment.worker,
            ticket=assignment.ticket,
            stamp=assignment.stamp,
            bucket=assignment.bucket,
            delay=self.iteration - assignment.stamp,
            reason=reason,
            grad_sum=grad_sum.hex(),
        )

    def _end_if_done(self) -> None:
        if self.assignments.done and not self.ended:
            self.algorithm.flush(self.lr(self.iteration - 1))
            self.forget_snapshots()
            self._end(Status.completed if all_finite(self.params) else Status.diverged)

    def _end(self, status: Status) -> None:
        if not self.ended:
            self.status = status
            self._record(Kind.end, iteration=self.iteration, status=status.value)

    def _answer(self) -> list[Reply]:
        """Reply to all released workers, with a ticket while there is one, or with the word to stop at the end."""
        enough = self._enough()
        released = self.blocked if self.ended else self.scheduler.due(self.blocked, self.assignments.holding)
        if released:
            self.idle.extend(released)
            gone = set(released)
            self.blocked = [worker for worker in self.blocked if worker not in gone]
        replies: list[Reply] = []
        for worker in list(self.idle):
            if not self.ended and (self.assignments.exhausted or not enough):
                break
            reply = self._reply(worker)
            if reply is not None:
                self.idle.remove(worker)
                self.members[worker].reply = reply
                replies.append(reply)
        return replies

    def _enough(self) -> bool:
        """Tell if there are ``min_workers``, and record when that changes."""
        enough = len(self.members) >= self.min_workers
        if enough == self.paused and not self.ended:
            self.paused = not enough
            kind = Kind.proceed if enough else Kind.pause
            self._record(kind, concurrency=len(self.members), minimum=self.min_workers)
        return enough

    def _reply(self, worker: int) -> Reply | None:
        ticket = None
        if not self.ended:
            fresh = self.assignments.issued
            assignment = self.assignments.assign(
                worker, self.iteration, self.buckets.current, self.algorithm.version, self.members
            )
            if assignment is None:
                return None
            ticket = assignment.ticket
            self.newest_bucket = max(self.newest_bucket, assignment.bucket)
            kind = Kind.issue if ticket >= fresh else Kind.reissue
            self._record(kind, worker=worker, ticket=ticket, stamp=assignment.stamp, bucket=assignment.bucket)
        lr = 0.0 if ticket is None else self.lr(self.iteration)  # a schedule need not know the iteration T
        return Reply(
            worker=worker,
            ticket=ticket,
            stamp=self.iteration,
            params=self.sent_snapshot() if ticket is None else self._params_for(worker, lr),
            lr=lr,
            steps=self.algorithm.steps,
            incarnation=self.incarnation,
        )

    def _params_for(self, worker: int, lr: float) -> Tensor:
        """Return what the algorithm sends this worker: the snapshot that replies of one stamp share, or its own vectors."""
        context = PullContext(worker=worker, concurrency=self.concurrency, lr=lr, bucket=self.buckets.current)
        began = self.timer()
        outgoing = self.algorithm.outgoing(context)
        params = self.sent_snapshot() if outgoing is self.params else self.handed_out(outgoing)
        self.step_seconds += self.timer() - began
        return params

    def _record(self, kind: Kind, **data: Any) -> None:
        self.record(Event(kind, self.clock(), data))
