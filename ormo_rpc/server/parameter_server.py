"""The parameter server: ledger of tickets, rule and scheduler in one place. Single-threaded by contract."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from torch import Tensor

from ormo_rpc.algorithms.base import Arrival, Dispatch
from ormo_rpc.errors import PushRefused, Rejoin
from ormo_rpc.messages import Push, Reply
from ormo_rpc.server.assignments import Issue
from ormo_rpc.server.events import Event, Kind
from ormo_rpc.server.state import Member, ServerState, Status
from ormo_rpc.server.validation import Checked, NormPolicy, all_finite, check_payload, check_whole

LOOK_EVERY = 64
"""Updates from one look at whether the parameters are finite to the next."""

__all__ = ["ParameterServer", "Status"]


class ParameterServer(ServerState):
    """Hands out tickets, applies each gradient once, and answers whom the scheduler says.

    Made by `build_server`. Every public method runs to its end before the next one is called; a runtime with threads holds one
    lock around them. `check` alone may run beside anything.

    Args:
        rule: The algorithm; it owns the parameters.
        scheduler: Who is answered when.
        num_workers: Workers 0 to num_workers - 1 are members from the start.
        lr: The scheduled learning rate, a pure function of the iteration.
        total_tickets: T, the number of gradients to apply; None means no end.
        min_workers: While fewer are members, no ticket is handed out; what is outstanding is applied.
        norm_guard: The limit to the norm of what is pushed.
        buffers: The running average of the buffers that come with the pushes.
        record: Called with each event, in order.
        clock: Seconds since the start of the run.
        timer: Seconds, real ones, for `step_seconds`.
        sent_dtype: What parameters are rounded to when they are handed out; None for as they are. Rules see, as what was sent,
            the rounded values in the dtype of the parameters.
        pushed_dtype: What pushes are of, bfloat16 or float16; None for the dtype of the parameters.
        process_of: From a worker to its process, where one has several; see `Ledger`.
    """

    # ------------------------------------------------------------------------------------------------------- membership

    def start(self, workers: Collection[int] | None = None) -> list[Reply]:
        """Begin a life of the server: every worker is handed a ticket at the present parameters.

        Tickets go to the workers in the order of their numbers. After `load_state_dict` this is a new incarnation: tickets that
        were outstanding are issued again, and a push of an older incarnation is answered "rejoin".

        Args:
            workers: Who is there; others may `join` later. By default, workers 0 to num_workers - 1.
        """
        present = sorted(range(self.num_workers) if workers is None else workers)
        if not self.started and present != list(range(self.num_workers)):
            self._record(Kind.resume, iteration=self.iteration, incarnation=self.incarnation, workers=present)
        if self.started:
            self.incarnation += 1
            for worker in list(self.members):
                self.ledger.revoke(worker)
            self._record(Kind.resume, iteration=self.iteration, incarnation=self.incarnation, workers=present)
            if self.status is Status.diverged and all_finite(self.params) and not self.ledger.done:
                self.status = Status.running  # gradients had gone astray, not the parameters: a lower rate may save them
        self.started = True
        for worker in set(self.members) - set(present):
            self.rule.leave(worker)
        self.members = {worker: Member() for worker in present}
        self.scheduler.start(self.members)
        self.waiting, self.parked, self.paused = list(self.members), [], False
        return self._answer()

    def go_on_as(self, life: int) -> None:
        """Be the life of that number (from 0) of a server that has died: `start` begins an incarnation that none before had."""
        self.incarnation = max(self.incarnation, life - 1)
        self.started = True

    def join(self, worker: int) -> list[Reply]:
        """A worker comes; K counts it from now on, so buckets opened from now on are larger.

        Raises:
            ValueError: it is a member already, or its number is negative or none.
        """
        check_whole(worker, "join: worker", ValueError)
        if worker in self.members:
            raise ValueError(f"join of worker {worker}: it is a member already; let it leave first, or use another number")
        if worker < 0:
            raise ValueError(f"join: got worker {worker}, expected a number >= 0")
        self.members[worker] = Member()
        self.waiting.append(worker)
        self.scheduler.join(worker)
        self._record(Kind.join, worker=worker, concurrency=self.concurrency)
        return self._answer()

    def leave(self, worker: int) -> list[Reply]:
        """A worker is gone: its tickets are issued again to others, and no barrier waits for it any more.

        Raises:
            ValueError: it is not a member.
        """
        check_whole(worker, "leave: worker", ValueError)
        if worker not in self.members:
            raise ValueError(f"leave of worker {worker}: it is not a member; members are {sorted(self.members)}")
        lost = [issue.ticket for issue in self.ledger.revoke(worker)]
        del self.members[worker]
        self.rule.leave(worker)
        self.scheduler.leave(worker)
        for queue in (self.waiting, self.parked):
            if worker in queue:
                queue.remove(worker)
        self._record(Kind.leave, worker=worker, concurrency=self.concurrency, tickets=lost)
        return self._answer()

    # ----------------------------------------------------------------------------------------------------------- pushes

    def receive(self, push: Push) -> list[Reply]:
        """Check a push, apply it, and return the replies that are due now: to its sender, to others, or to nobody.

        A push that repeats its sender's newest one is not applied again and gets the identical reply, or none while the
        scheduler still holds that reply back.

        Raises:
            PushRefused: the push does not fit; nothing has changed. `NonFiniteGradient` and `Rejoin` are special cases.
        """
        return self.redeem(push, self.check(push))

    def check(self, push: Push) -> Checked:
        """The part of `receive` that needs no lock: types, and the payload's shape, dtype, device, finiteness and norm.

        Returns:
            What `redeem` applies: of the parameters' dtype, unless the rule's step reads that of the wire.

        Raises:
            PushRefused: the payload does not fit.
        """
        rule = self.rule
        checked = check_payload(
            push, self.params, self.buffers.average, rule.VECTORS_PUSHED, self.norm_guard, self.pushed_dtype
        )
        if rule.OUT_OF_PLACE or checked.grad.dtype == self.params.dtype:
            return checked
        return replace(checked, grad=checked.grad.to(self.params.dtype))

    def redeem(self, push: Push, checked: Checked) -> list[Reply]:
        """The part of `receive` that changes the server; ``checked`` is what `check` returned.

        Raises:
            PushRefused: the push does not fit the ledger; nothing has changed.
        """
        member, issue = self._claim(push)
        if issue is None:
            return self._again(push.worker)
        sent = None if member.reply is None else member.reply.params
        if sent is None and self.rule.READS_SENT:
            raise Rejoin(f"push of worker {push.worker}: what it was sent was lost when the server's state was loaded; rejoin")
        if sent is not None and self.rule.READS_SENT:
            sent = sent.to(self.params.dtype)
        member.answered, member.reply = (push.ticket, push.stamp), None
        arrival = Arrival(
            worker=push.worker,
            ticket=push.ticket,
            iteration=self.iteration,
            stamp=issue.stamp,
            bucket=issue.bucket,
            newest_bucket=self.newest_bucket,
            concurrency=self.concurrency,
            lr=self.lr(self.iteration),
            version=issue.version,
            sent=sent,
        )
        if self.ended:
            self._discard(issue, checked.grad_sum, reason="the run has ended")
        elif not self.rule.accepts(arrival):
            self._discard(issue, checked.grad_sum, reason="refused by the rule")
        else:
            self._apply(push, issue, arrival, checked)
        self.waiting.append(push.worker)
        self.scheduler.settle(push.worker)
        return self._answer()

    def reject(self, push: Push) -> list[Reply]:
        """Settle a push that `check` found not finite or too large: its ticket goes to another worker, its sender has new work.

        When the parameters are not finite either, or the gradient of one ticket is so from workers of two processes (or twice
        from the only one), they are at fault, not the worker, and the run ends as `diverged`.

        Raises:
            PushRefused: the push does not fit the ledger; nothing has changed.
        """
        member, issue = self._claim(push)
        if issue is None:
            return self._again(push.worker)
        member.answered, member.reply = (push.ticket, push.stamp), None
        seen_before = push.ticket in self.ledger.refused_by
        limited = self.norm_guard is not None and self.norm_guard.policy is NormPolicy.refuse
        self._discard(issue, math.nan, reason="not finite or too large" if limited else "not finite", refused=True)
        if seen_before or not all_finite(self.params):
            self._end(Status.diverged)
        self.waiting.append(push.worker)
        self.scheduler.settle(push.worker)
        return self._answer()

    def finish(self) -> list[Reply]:
        """Issue no further ticket; the run is completed once the outstanding ones are redeemed."""
        self.ledger.close()
        self._record(Kind.finish, iteration=self.iteration)
        self._end_if_done()
        return self._answer()

    def stop(self) -> list[Reply]:
        """End now: everybody who waits is told to stop, everybody else with its next push, which is not applied."""
        self._end(Status.stopped)
        return self._answer()

    # ---------------------------------------------------------------------------------------------------------- inside

    def _claim(self, push: Push) -> tuple[Member, Issue | None]:
        """The sender and the issue that its push answers; None for a push that is to be dropped: repeated or taken away."""
        sender = f"push of worker {push.worker} for ticket {push.ticket}"
        if push.incarnation != self.incarnation:
            raise Rejoin(
                f"{sender}: incarnation: got {push.incarnation}, expected {self.incarnation}; the server has restarted: rejoin"
            )
        if push.worker not in self.members:
            raise Rejoin(f"{sender}: it is not a member, members are {sorted(self.members)}; join (again) to get work")
        member = self.members[push.worker]
        try:
            issue = self.ledger.claim(push, self.iteration)
        except PushRefused:
            if member.answered != (push.ticket, push.stamp):
                raise
            issue = None
        if issue is None and member.answered == (push.ticket, push.stamp):
            self._record(Kind.repeat, worker=push.worker, ticket=push.ticket, stamp=push.stamp)
        elif issue is None:
            self._record(Kind.discard, worker=push.worker, ticket=push.ticket, stamp=push.stamp, reason="taken away")
        return member, issue

    def _again(self, worker: int) -> list[Reply]:
        """The newest reply once more; nothing while it is still to come."""
        reply = self.members[worker].reply
        if reply is not None:
            return [reply]
        if worker not in self.waiting and worker not in self.parked:
            raise Rejoin(f"push of worker {worker}: its newest reply was lost when the server's state was loaded; rejoin")
        return []

    def _apply(self, push: Push, issue: Issue, arrival: Arrival, checked: Checked) -> None:
        lr = self.rule.learning_rate(arrival)
        began = self.timer()
        self.rule.step(checked.grad, lr, arrival)
        self.step_seconds += self.timer() - began
        self.buffers.update(push.buffers)
        self.ledger.redeem(issue)
        self.iteration += 1
        self.buckets.advance(self.concurrency)
        self.forget_snapshots()
        self._record(
            Kind.apply,
            iteration=arrival.iteration,
            worker=push.worker,
            ticket=push.ticket,
            stamp=issue.stamp,
            bucket=issue.bucket,
            delay=arrival.delay,
            eta=lr,
            loss=push.loss,
            samples=push.samples,
            grad_sum=checked.grad_sum.hex(),
            **({} if checked.clipped_norm is None else {"clipped_norm": checked.clipped_norm.hex()}),
        )
        # Now and then, as it costs a pass over memory, and NaN neither goes away by itself nor hides: gradients show it, too.
        if self.iteration % LOOK_EVERY == 0 and not all_finite(self.params):
            self._end(Status.diverged)
        self._end_if_done()

    def _discard(self, issue: Issue, grad_sum: float, *, reason: str, refused: bool = False) -> None:
        self.ledger.give_back(issue, refused=refused)
        self._record(
            Kind.discard,
            worker=issue.worker,
            ticket=issue.ticket,
            stamp=issue.stamp,
            bucket=issue.bucket,
            delay=self.iteration - issue.stamp,
            reason=reason,
            grad_sum=grad_sum.hex(),
        )

    def _end_if_done(self) -> None:
        if self.ledger.done and not self.ended:
            self.rule.flush(self.lr(self.iteration - 1))
            self.forget_snapshots()
            self._end(Status.completed if all_finite(self.params) else Status.diverged)

    def _end(self, status: Status) -> None:
        if not self.ended:
            self.status = status
            self._record(Kind.end, iteration=self.iteration, status=status.value)

    def _answer(self) -> list[Reply]:
        """Reply to all whom the scheduler lets go and for whom there is a ticket, or the word to stop."""
        enough = self._enough()
        released = self.waiting if self.ended else self.scheduler.due(self.waiting, self.ledger.holding)
        if released:
            self.parked.extend(released)
            gone = set(released)
            self.waiting = [worker for worker in self.waiting if worker not in gone]
        replies: list[Reply] = []
        for worker in list(self.parked):
            if not self.ended and (self.ledger.exhausted or not enough):
                break
            reply = self._reply(worker)
            if reply is not None:
                self.parked.remove(worker)
                self.members[worker].reply = reply
                replies.append(reply)
        return replies

    def _enough(self) -> bool:
        """Whether there are ``min_workers``; says so when that changes."""
        enough = len(self.members) >= self.min_workers
        if enough == self.paused and not self.ended:
            self.paused = not enough
            kind = Kind.proceed if enough else Kind.pause
            self._record(kind, concurrency=len(self.members), minimum=self.min_workers)
        return enough

    def _reply(self, worker: int) -> Reply | None:
        ticket = None
        if not self.ended:
            fresh = self.ledger.issued
            issue = self.ledger.take(worker, self.iteration, self.buckets.current, self.rule.version, self.members)
            if issue is None:
                return None
            ticket = issue.ticket
            self.newest_bucket = max(self.newest_bucket, issue.bucket)
            kind = Kind.issue if ticket >= fresh else Kind.reissue
            self._record(kind, worker=worker, ticket=ticket, stamp=issue.stamp, bucket=issue.bucket)
        lr = 0.0 if ticket is None else self.lr(self.iteration)  # a schedule need not know the iteration T
        return Reply(
            worker=worker,
            ticket=ticket,
            stamp=self.iteration,
            params=self.sent_snapshot() if ticket is None else self._params_for(worker, lr),
            lr=lr,
            steps=self.rule.options.steps,
            incarnation=self.incarnation,
        )

    def _params_for(self, worker: int, lr: float) -> Tensor:
        """What the rule sends this worker: the snapshot that all replies of one stamp share, unless each gets its own."""
        dispatch = Dispatch(worker=worker, concurrency=self.concurrency, lr=lr, bucket=self.buckets.current)
        began = self.timer()
        outgoing = self.rule.outgoing(dispatch)
        params = self.sent_snapshot() if outgoing is self.params else self.handed_out(outgoing)
        self.step_seconds += self.timer() - began
        return params

    def _record(self, kind: Kind, **data: Any) -> None:
        self.record(Event(kind, self.clock(), data))
