"""The parameter server: assignments of tickets, algorithm and scheduler in one place. Single-threaded by contract."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ormo_rpc.algorithms.base import Algorithm, PushContext
from ormo_rpc.errors import GradientOverflow, GradientTooLarge, NonFiniteGradient, PushRefused, StaleSession
from ormo_rpc.messages import Push, Reply
from ormo_rpc.schedulers.base import Scheduler
from ormo_rpc.server.answering import answer, cancel
from ormo_rpc.server.assignments import Assignment, Assignments
from ormo_rpc.server.buckets import Buckets
from ormo_rpc.server.buffers import RunningBuffers
from ormo_rpc.server.elastic import ElasticConsistency
from ormo_rpc.server.ema import Ema
from ormo_rpc.server.events import EventLog, Kind
from ormo_rpc.server.loss_scale import LossScale
from ormo_rpc.server.members import Member, Members
from ormo_rpc.server.snapshots import Snapshots
from ormo_rpc.server.state import Status, load, save
from ormo_rpc.server.validation import NormLimit, NormPolicy, ValidatedPush, all_finite, validate_push

FINITE_CHECK_INTERVAL = 64
"""Check the parameters for NaN and infinity every this many updates."""
OVERFLOW = "overflow at loss scale"
"""The beginning of the reason why the gradient of a scaled loss is discarded."""

__all__ = ["ParameterServer", "Status"]


@dataclass(kw_only=True, eq=False, repr=False)
class ParameterServer:
    """The server core: hands out tickets, applies each gradient once, and replies to the workers that the scheduler releases.

    A push takes this way: `receive` = `validate` (no lock needed) and `commit`, which matches it to its assignment, applies or
    discards its gradient (`_match`, `_apply` or `_discard`), and replies to all released workers (`answering.answer`).

    Made by `build_server`. Every public method runs to its end before the next one is called; a runtime with threads holds one
    lock around them. `validate` alone may run beside anything.
    """

    algorithm: Algorithm
    """The algorithm; it owns the parameters."""
    scheduler: Scheduler
    """Decides when a worker gets its next ticket."""
    num_workers: int
    """Workers 0 to num_workers - 1 are members from the start."""
    lr: Callable[[int], float]
    """The scheduled learning rate, a pure function of the iteration."""
    members: Members
    """The workers, and the queues in which the scheduler holds them."""
    assignments: Assignments
    """The tickets: new, outstanding, committed."""
    snapshots: Snapshots
    """The parameters as they are sent and saved."""
    buffers: RunningBuffers
    """The buffers of the model."""
    events: EventLog
    """The recorder of events."""
    ema: Ema | None = None
    """The moving average of the parameters, where there is one."""
    min_workers: int = 1
    """While fewer are members, no ticket is handed out; what is outstanding is applied."""
    norm_limit: NormLimit | None = None
    """The limit to the norm of a push."""
    pushed_dtype: torch.dtype | None = None
    """The dtype of pushes, bfloat16 or float16; None for that of the parameters."""
    loss_scale: LossScale | None = None
    """The scale of the losses of workers that compute in float16; None where none does."""
    elastic: ElasticConsistency | None = None
    """Measures how far parameters move between a reply and its push; None for not at all."""
    timer: Callable[[], float] = lambda: 0.0
    """Real seconds, for `step_seconds`."""
    before_first_save: Callable[[], None] | None = None
    """Refuses a state that would not continue as it should; called once."""
    on_cancel: Callable[[Collection[int]], None] = lambda _: None
    """Called with workers whose tickets were taken back: what they compute for them must not be pushed any more."""

    status: Status = field(default=Status.running, init=False)
    iteration: int = field(default=0, init=False)
    """The number of gradients applied: the index of the present parameters."""
    incarnation: int = field(default=0, init=False)
    """The number of servers before this one in the same run; pushes of another incarnation are refused."""
    paused: bool = field(default=False, init=False)
    """There are fewer than ``min_workers`` members, and there were enough before."""
    buckets: Buckets = field(default_factory=Buckets, init=False)
    newest_bucket: int = field(default=0, init=False)
    """The largest bucket of an assignment."""
    started: bool = field(default=False, init=False)
    step_seconds: float = field(default=0.0, init=False)
    """Time in the algorithm's steps, the moving average and in making vectors for replies, by the timer; not saved."""

    @property
    def params(self) -> torch.Tensor:
        """``w``, shape (D,), as it stands: to be read only, and at once, as the next gradient may change or replace it."""
        return self.algorithm.params

    @property
    def device(self) -> torch.device:
        """The device of parameters, buffers and all vectors of the algorithm."""
        return self.params.device

    @property
    def concurrency(self) -> int:
        """K, the number of gradients in flight."""
        return max(1, len(self.members))

    @property
    def ended(self) -> bool:
        """True once no more gradient will be applied."""
        return self.status is not Status.running

    def evaluated(self) -> torch.Tensor:
        """Return what evaluations use, shape (D,), in memory that never changes: the moving average, or the parameters."""
        return self.snapshots.exact() if self.ema is None else self.ema.copy()

    def state_dict(self, *, replies: bool = False) -> dict[str, Any]:
        """Return everything that the future of the run depends on, as a private copy of tensors and plain values.

        Without the replies, call `start` after `load_state_dict` to assign outstanding tickets anew, or resume with pushes for
        them, which an algorithm with `Algorithm.READS_SENT` refuses.

        Args:
            replies: Include the newest reply of each worker, with its parameters; a server that loads them goes on exactly as
                this one would.

        Raises:
            ValueError: the algorithm or scheduler comes from outside of the package, and forgets a part of its state.
        """
        if self.before_first_save is not None:
            self.before_first_save()
            self.before_first_save = None
        return save(self, replies)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; the number of tickets stays the one that this server was built with.

        Raises:
            ValueError: it has more applied gradients than this server is to apply, or is of another format, algorithm,
                scheduler, dtype, shape or set of buffers; nothing is changed then.
        """
        with torch.no_grad():  # whoever made the state, later steps must not hang on its graph
            load(self, state)

    # ------------------------------------------------------------------------------------------------------- membership

    def start(self, workers: Collection[int] | None = None) -> list[Reply]:
        """Begin an incarnation of the server: every worker gets a ticket at the present parameters.

        Tickets go to the workers in the order of their numbers. After `load_state_dict` this is a new incarnation: tickets that
        were outstanding are issued again, and a push of an older incarnation is answered "rejoin".

        Args:
            workers: The members at the start; others may `join` later. By default, workers 0 to num_workers - 1.
        """
        present = sorted(range(self.num_workers) if workers is None else workers)
        if not self.started and present != list(range(self.num_workers)):
            self.events.add(Kind.resume, iteration=self.iteration, incarnation=self.incarnation, workers=present)
        if self.started:
            self.incarnation += 1
            for worker in list(self.members):
                self.assignments.revoke(worker)
            self.events.add(Kind.resume, iteration=self.iteration, incarnation=self.incarnation, workers=present)
            if self.status is Status.diverged and all_finite(self.params) and not self.assignments.done:
                self.status = Status.running  # gradients had gone astray, not the parameters: a lower rate may save them
                if self.loss_scale is not None and self.loss_scale.exhausted:
                    self.loss_scale.restart()
        self.started = True
        for worker in set(self.members) - set(present):
            self.algorithm.leave(worker)
        for worker in sorted(set(present) - set(self.members)):
            self.algorithm.join(worker)
        self.members.start(present)
        self.paused = False
        return answer(self)

    def resume_as(self, incarnation: int) -> None:
        """Take the place of a server process that died: `start` begins this incarnation, or a later one that is new."""
        self.incarnation = max(self.incarnation, incarnation - 1)
        self.started = True

    def join(self, worker: int) -> list[Reply]:
        """Add a worker; K counts it from now on, so buckets opened from now on are larger.

        Raises:
            ValueError: it is a member already, or its number is negative or no whole number.
        """
        self.members.join(worker)
        self.algorithm.join(worker)
        self.events.add(Kind.join, worker=worker, concurrency=self.concurrency)
        return answer(self)

    def leave(self, worker: int) -> list[Reply]:
        """Remove a worker: its tickets are issued again to others, and no barrier waits for it any more.

        Raises:
            ValueError: it is not a member.
        """
        self.members.leave(worker)
        self.algorithm.leave(worker)
        lost = [assignment.ticket for assignment in self.assignments.revoke(worker)]
        self.events.add(Kind.leave, worker=worker, concurrency=self.concurrency, tickets=lost)
        return answer(self)

    # ----------------------------------------------------------------------------------------------------------- pushes

    def receive(self, push: Push) -> list[Reply]:
        """Settle a push, and return the replies that are due now: to its sender, to others, or to nobody.

        A gradient that is finite is applied. One that is not is discarded: its ticket goes to another worker, its sender gets
        new work. Where losses are scaled, it lowers the scale instead, and its ticket goes to anyone.

        A push that repeats its sender's newest one is not settled again and gets the identical reply, or none while the
        scheduler holds that reply back.

        Raises:
            PushRefused: the push does not fit; nothing has changed. `StaleSession` is a special case.
        """
        return self.commit(push, self.validate(push))

    def validate(self, push: Push) -> ValidatedPush:
        """Check the payload: the part of `receive` that needs no lock.

        Returns:
            What `commit` settles, on the server's device; tensors on the CPU are copied there, so that their memory may change
            then. Its gradient is of the parameters' dtype, unless the algorithm's step reads that of the wire.

        Raises:
            PushRefused: the payload has the wrong types, shape, dtype or device.
        """
        algorithm = self.algorithm
        try:
            validated = validate_push(
                push, self.params, self.buffers, algorithm.VECTORS_PUSHED, self.norm_limit, self.pushed_dtype
            )
        except NonFiniteGradient as error:
            if self.loss_scale is not None and not isinstance(error, GradientTooLarge):
                error = GradientOverflow(str(error))
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
            return self.members.newest_reply(push.worker)
        if validated.rejected is not None:
            self._reject(push, member, assignment, overflow=isinstance(validated.rejected, GradientOverflow))
            return self._settled(push)
        sent = None if member.reply is None else member.reply.params
        if sent is None and self.algorithm.READS_SENT:
            raise StaleSession(
                f"push of worker {push.worker}: what it was sent was lost when the server's state was loaded; rejoin"
            )
        if sent is not None and self.algorithm.READS_SENT:
            sent = sent.to(self.params.dtype)
        member.answered, member.reply = (push.ticket, push.stamp, push.loss_scale), None
        context = PushContext(
            worker=push.worker,
            ticket=push.ticket,
            iteration=self.iteration,
            stamp=assignment.stamp,
            bucket=assignment.bucket,
            newest_bucket=self.newest_bucket,
            concurrency=self.concurrency,
            lr=self.lr(self.iteration),
            sent_lr=self.lr(assignment.stamp) if assignment.lr is None else assignment.lr,
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

    def reject(self, push: Push, *, overflow: bool = False) -> list[Reply]:
        """Settle a push like one whose gradient is not finite, for a caller that knows so without the gradient.

        Args:
            push: The push.
            overflow: Lower the loss scale, and blame nobody.

        Raises:
            PushRefused: the push does not fit the assignments; nothing has changed.
        """
        error = (GradientOverflow if overflow else NonFiniteGradient)("rejected by the caller")
        return self.commit(push, ValidatedPush(push.grad, math.nan, rejected=error))

    def finish(self) -> list[Reply]:
        """Hand out no further ticket; the run is completed once the outstanding ones are committed."""
        self.assignments.close()
        self.events.add(Kind.finish, iteration=self.iteration)
        self._end_if_done()
        return answer(self)

    def stop(self) -> list[Reply]:
        """End now: waiting workers are told to stop, the others with their next push, which is not applied."""
        self._end(Status.stopped)
        return answer(self)

    def end_round(self) -> None:
        """Apply the rest of a round that no further gradient will complete."""
        self.algorithm.flush(self.lr(max(self.iteration - 1, 0)))
        self.snapshots.invalidate()

    # ---------------------------------------------------------------------------------------------------------- inside

    def _match(self, push: Push) -> tuple[Member, Assignment | None]:
        """Return the sender and the assignment that its push answers; None for a push that is repeated or was revoked."""
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
            if member.answered != (push.ticket, push.stamp, push.loss_scale):
                raise
            assignment = None
        place: dict[str, float] = {"worker": push.worker, "ticket": push.ticket, "stamp": push.stamp}
        if self.loss_scale is not None:
            place["loss_scale"] = push.loss_scale
        if assignment is None and member.answered == (push.ticket, push.stamp, push.loss_scale):
            self.events.add(Kind.repeat, **place)
        elif assignment is None:
            self.events.add(Kind.discard, **place, reason="taken away")
        return member, assignment

    def _apply(self, push: Push, assignment: Assignment, context: PushContext, validated: ValidatedPush) -> None:
        lr = self.algorithm.learning_rate(context)
        elastic = None if self.elastic is None else self.elastic.measure(self.params, context)
        began = self.timer()
        self.algorithm.step(validated.grad, lr, context)
        if self.ema is not None:
            self.ema.update(self.params)
        self.step_seconds += self.timer() - began
        self.buffers.update(validated.buffers)
        self.assignments.commit(assignment)
        self.iteration += 1
        self.buckets.advance(self.concurrency)
        self.snapshots.invalidate()
        if self.loss_scale is not None:
            self.loss_scale.applied(assignment.loss_scale)
        self.events.applied(push, context, validated, lr, elastic)
        # Not each time, as it costs a pass over memory; NaN in the parameters stays, and shows in the next gradients too.
        if self.iteration % FINITE_CHECK_INTERVAL == 0 and not all_finite(self.params):
            self._end(Status.diverged)
        self._end_if_done()

    def _discard(self, assignment: Assignment, grad_sum: float, *, reason: str, refused: bool = False) -> None:
        self.assignments.requeue(assignment, refused=refused)
        self.events.discarded(assignment, self.iteration, grad_sum, reason)

    def _reject(self, push: Push, member: Member, assignment: Assignment, *, overflow: bool) -> None:
        """Requeue the ticket of a gradient that is not finite, for a worker of another process.

        The run ends as `diverged` if the parameters are not finite either, or if this is the second such gradient for the
        ticket: it comes from another process, where there is one, so the worker is not to blame. Where losses are scaled, the
        ticket goes to anyone, at a smaller scale, and the run ends when that is exhausted.
        """
        member.answered, member.reply = (push.ticket, push.stamp, push.loss_scale), None
        if overflow and self.loss_scale is not None:
            self._discard(assignment, math.nan, reason=f"{OVERFLOW} {assignment.loss_scale:.17g}")
            self.loss_scale.overflowed(assignment.loss_scale)
            if self.loss_scale.exhausted or not all_finite(self.params):
                self._end(Status.diverged)
            return
        seen_before = push.ticket in self.assignments.refused_by
        limited = self.norm_limit is not None and self.norm_limit.policy is NormPolicy.refuse
        self._discard(assignment, math.nan, reason="not finite or too large" if limited else "not finite", refused=True)
        if seen_before or not all_finite(self.params):
            self._end(Status.diverged)

    def _settled(self, push: Push) -> list[Reply]:
        """Queue the sender of a settled push for its next ticket, and return the replies that are due."""
        self.members.settle(push.worker)
        if self.algorithm.cancels:
            cancel(self)
        return answer(self)

    def _end_if_done(self) -> None:
        if self.assignments.done and not self.ended:
            self.end_round()
            self._end(Status.completed if all_finite(self.params) else Status.diverged)

    def _end(self, status: Status) -> None:
        if not self.ended:
            self.status = status
            self.events.add(Kind.end, iteration=self.iteration, status=status.value)
