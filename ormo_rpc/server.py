"""The parameter server: ledger of tickets, rule and scheduler in one place. Single-threaded by contract."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ormo_rpc.algorithms.base import Algorithm, Arrival, Dispatch
from ormo_rpc.buckets import Buckets
from ormo_rpc.buffers import RunningBuffers
from ormo_rpc.checks import all_finite, check_payload
from ormo_rpc.errors import PushRefused, Rejoin
from ormo_rpc.ledger import Issue, Ledger
from ormo_rpc.messages import Push, Reply
from ormo_rpc.records import Event, Kind
from ormo_rpc.schedulers import Scheduler

STATE_VERSION = 1
"""The format of `ParameterServer.state_dict`; another one is refused."""


class Status(Enum):
    """Where a run stands."""

    running = "running"
    completed = "completed"
    """Every ticket is redeemed, or the run was asked to end early and did."""
    diverged = "diverged"
    """The parameters are not finite, or a ticket's gradient was not, from two workers."""
    stopped = "stopped"
    """Asked to end before its time; outstanding tickets were not waited for."""


@dataclass(slots=True)
class _Member:
    """What the server remembers of one worker: its newest push, and its newest reply unless one is due."""

    answered: tuple[int, int] | None = None
    reply: Reply | None = None


class ParameterServer:
    """Hands out tickets, applies each gradient once, and answers whom the scheduler says.

    Made by `build_server`. Every public method runs to its end before the next one is called; a runtime with threads holds one
    lock around them. `check` alone may run beside anything.

    Args:
        rule: The algorithm; it owns the parameters.
        scheduler: Who is answered when.
        num_workers: Workers 0 to num_workers - 1 are members from the start.
        lr: The scheduled learning rate, a pure function of the iteration.
        total_tickets: T, the number of gradients to apply; None means no end.
        buffers: The running average of the buffers that come with the pushes.
        record: Called with each event, in order.
        clock: Seconds since the start of the run.
    """

    def __init__(
        self,
        rule: Algorithm,
        scheduler: Scheduler,
        *,
        num_workers: int,
        lr: Callable[[int], float],
        total_tickets: int | None = None,
        buffers: RunningBuffers | None = None,
        record: Callable[[Event], None] = lambda _: None,
        clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.rule = rule
        self.scheduler = scheduler
        self.num_workers = num_workers
        self.lr = lr
        self.buffers = buffers or RunningBuffers({}, {})
        self.record = record
        self.clock = clock

        self.status = Status.running
        self.iteration = 0
        self.incarnation = 0
        self.buckets = Buckets()
        self.newest_bucket = 0
        self.ledger = Ledger(total_tickets)
        self.members: dict[int, _Member] = {}
        self.waiting: list[int] = []
        """Workers whose answer the scheduler holds back, in the order of asking."""
        self.parked: list[int] = []
        """Workers to be answered as soon as there is a ticket for them, or the run ends."""
        self._started = False
        self._snapshot: Tensor | None = None

    # ------------------------------------------------------------------------------------------------------------ state

    @property
    def params(self) -> Tensor:
        """``w``, shape (D,), as it stands: live, to be read only."""
        return self.rule.params

    @property
    def concurrency(self) -> int:
        """K, the number of gradients in the making."""
        return max(1, len(self.members))

    @property
    def ended(self) -> bool:
        """No more gradient will be applied."""
        return self.status is not Status.running

    def snapshot(self) -> Tensor:
        """``w`` as it stands, shape (D,), as a copy that never changes; one copy serves all who ask at the same iteration."""
        if self._snapshot is None:
            self._snapshot = self.params.clone()
        return self._snapshot

    def state_dict(self) -> dict[str, Any]:
        """Everything that the future of the run depends on, as a private copy that `torch.load` reads with weights_only.

        Replies are not in it: after `load_state_dict`, go on with the outstanding tickets, or call `start` to issue them anew,
        which a rule that reads what was sent (`Algorithm.READS_SENT`) cannot do without.
        """
        return {
            "version": STATE_VERSION,
            "algorithm": self.rule.NAME,
            "scheduler": self.scheduler.NAME,
            "params": self.snapshot(),
            "rule": {k: v.clone() if isinstance(v, Tensor) else v for k, v in self.rule.state().items()},
            "buffers": self.buffers.state(),
            "status": self.status.value,
            "iteration": self.iteration,
            "incarnation": self.incarnation,
            "buckets": (self.buckets.current, self.buckets.room),
            "newest_bucket": self.newest_bucket,
            "ledger": self.ledger.state(),
            "members": {worker: member.answered for worker, member in self.members.items()},
            "waiting": list(self.waiting),
            "parked": list(self.parked),
            "clocks": self.scheduler.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; the number of tickets stays the one that this server was built with.

        Raises:
            ValueError: it has more applied gradients than this server is to apply, or is of another format, rule, scheduler,
                dtype, shape or set of buffers; nothing is changed then.
        """
        mine = {
            "version": STATE_VERSION,
            "algorithm": self.rule.NAME,
            "scheduler": self.scheduler.NAME,
            "params": _layout({"params": self.params}),
            "buffers": _layout(self.buffers.state()),
            "rule": _layout(self.rule.state()),
        }
        theirs = {
            **{key: state.get(key) for key in ("version", "algorithm", "scheduler")},
            "params": _layout({"params": state.get("params")}),
            "buffers": _layout(state.get("buffers", {})),
            "rule": _layout(state.get("rule", {})),
        }
        for key, expected in mine.items():
            if theirs[key] != expected:
                raise ValueError(
                    f"state of a server: {key}: got {theirs[key]}, expected {expected}; build this server as that one was"
                )
        if self.ledger.total is not None and state["iteration"] > self.ledger.total:
            raise ValueError(f"state of a server: iteration: got {state['iteration']}, expected at most {self.ledger.total}")
        self.params.copy_(state["params"])
        self.rule.load_state(state["rule"])
        self.buffers.load_state(state["buffers"])
        self.iteration = state["iteration"]
        self.incarnation = state["incarnation"]
        self.buckets = Buckets(*state["buckets"])
        self.newest_bucket = state["newest_bucket"]
        total = self.ledger.total
        self.ledger = Ledger.from_state(state["ledger"])
        self.ledger.total = total
        diverged = state["status"] == Status.diverged.value
        self.status = Status.diverged if diverged else Status.completed if self.ledger.done else Status.running
        self.members = {worker: _Member(answered) for worker, answered in state["members"].items()}
        self.waiting = list(state["waiting"])
        self.parked = list(state["parked"])
        self.scheduler.load_state(state["clocks"])
        self._started = True
        self._snapshot = None

    # ------------------------------------------------------------------------------------------------------- membership

    def start(self) -> list[Reply]:
        """Begin a life of the server: every worker is handed a ticket at the present parameters.

        After `load_state_dict` this is a new incarnation: tickets that were outstanding are issued again, and a push of an
        older incarnation is answered "rejoin".
        """
        if self._started:
            self.incarnation += 1
            for worker in list(self.members):
                self.ledger.revoke(worker)
            self._record(Kind.resume, iteration=self.iteration, incarnation=self.incarnation)
            if self.status is Status.diverged and all_finite(self.params) and not self.ledger.done:
                self.status = Status.running  # gradients had gone astray, not the parameters: a lower rate may save them
        self._started = True
        for worker in set(self.members) - set(range(self.num_workers)):
            self.rule.leave(worker)
        self.members = {worker: _Member() for worker in range(self.num_workers)}
        self.scheduler.start(self.members)
        self.waiting, self.parked = list(self.members), []
        return self._answer()

    def join(self, worker: int) -> list[Reply]:
        """A worker comes; K counts it from now on, so buckets opened from now on are larger.

        Raises:
            ValueError: it is a member already, or its number is negative.
        """
        if worker in self.members:
            raise ValueError(f"join of worker {worker}: it is a member already; let it leave first, or use another number")
        if worker < 0:
            raise ValueError(f"join: got worker {worker}, expected a number >= 0")
        self.members[worker] = _Member()
        self.waiting.append(worker)
        self.scheduler.join(worker)
        self._record(Kind.join, worker=worker, concurrency=self.concurrency)
        return self._answer()

    def leave(self, worker: int) -> list[Reply]:
        """A worker is gone: its tickets are issued again to others, and no barrier waits for it any more.

        Raises:
            ValueError: it is not a member.
        """
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

    def check(self, push: Push) -> float:
        """The part of `receive` that needs no lock: the payload's shape, dtype, device and finiteness.

        Returns:
            The sum of the gradient, for `redeem`.

        Raises:
            PushRefused: the payload does not fit.
        """
        return check_payload(push, self.params, self.buffers.average, self.rule.VECTORS_PUSHED)

    @torch.no_grad()  # a gradient may still hang on its graph, which the parameters must not grow into
    def redeem(self, push: Push, grad_sum: float) -> list[Reply]:
        """The part of `receive` that changes the server; ``grad_sum`` is what `check` returned.

        Raises:
            PushRefused: the push does not fit the ledger; nothing has changed.
        """
        member, issue = self._claim(push)
        if issue is None:
            return self._again(push.worker)
        sent = None if member.reply is None else member.reply.params
        if sent is None and self.rule.READS_SENT:
            raise Rejoin(f"push of worker {push.worker}: what it was sent was lost when the server's state was loaded; rejoin")
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
            self._discard(issue, grad_sum, reason="the run has ended")
        elif not self.rule.accepts(arrival):
            self._discard(issue, grad_sum, reason="refused by the rule")
        else:
            self._apply(push, issue, arrival, grad_sum)
        self.waiting.append(push.worker)
        self.scheduler.settle(push.worker)
        return self._answer()

    def reject(self, push: Push) -> list[Reply]:
        """Settle a push whose payload `check` found not finite: the ticket goes to another worker, the sender gets other work.

        When the gradient of one ticket is not finite from two workers (or twice from the only one), the parameters are at
        fault, not the worker, and the run ends as `diverged`.

        Raises:
            PushRefused: the push does not fit the ledger; nothing has changed.
        """
        member, issue = self._claim(push)
        if issue is None:
            return self._again(push.worker)
        member.answered, member.reply = (push.ticket, push.stamp), None
        seen_before = push.ticket in self.ledger.refused_by
        self._discard(issue, math.nan, reason="not finite", refused=True)
        if seen_before:
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

    def _claim(self, push: Push) -> tuple[_Member, Issue | None]:
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

    def _apply(self, push: Push, issue: Issue, arrival: Arrival, grad_sum: float) -> None:
        lr = self.rule.learning_rate(arrival)
        self.rule.step(push.grad, lr, arrival)
        self.buffers.update(push.buffers)
        self.ledger.redeem(issue)
        self.iteration += 1
        self.buckets.advance(self.concurrency)
        self._snapshot = None
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
            grad_sum=grad_sum.hex(),
        )
        # One look at the parameters a bucket: it costs a pass over memory, and NaN does not go away by itself.
        if self.buckets.room == 0 and not all_finite(self.params):
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
            self._snapshot = None
            self._end(Status.completed if all_finite(self.params) else Status.diverged)

    def _end(self, status: Status) -> None:
        if not self.ended:
            self.status = status
            self._record(Kind.end, iteration=self.iteration, status=status.value)

    def _answer(self) -> list[Reply]:
        """Reply to all whom the scheduler lets go and for whom there is a ticket, or the word to stop."""
        released = self.waiting if self.ended else self.scheduler.due(self.waiting, self.ledger.holding)
        if released:
            self.parked.extend(released)
            gone = set(released)
            self.waiting = [worker for worker in self.waiting if worker not in gone]
        replies: list[Reply] = []
        for worker in list(self.parked):
            if self.ledger.exhausted and not self.ended:
                break
            reply = self._reply(worker)
            if reply is not None:
                self.parked.remove(worker)
                self.members[worker].reply = reply
                replies.append(reply)
        return replies

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
            params=self.snapshot() if ticket is None else self._params_for(worker, lr),
            lr=lr,
            steps=self.rule.options.steps,
            incarnation=self.incarnation,
        )

    def _params_for(self, worker: int, lr: float) -> Tensor:
        """What the rule sends this worker: the snapshot that all replies of one stamp share, unless each gets its own."""
        dispatch = Dispatch(worker=worker, concurrency=self.concurrency, lr=lr, bucket=self.buckets.current)
        outgoing = self.rule.outgoing(dispatch)
        return self.snapshot() if outgoing is self.params else outgoing.clone()

    def _record(self, kind: Kind, **data: Any) -> None:
        self.record(Event(kind, self.clock(), data))


def _layout(values: Mapping[str, Any]) -> dict[str, str]:
    """What is under each name: dtype and shape of a tensor, "number" otherwise; what is kept for each worker comes and goes."""
    return {
        k: f"{v.dtype} {tuple(v.shape)}" if isinstance(v, Tensor) else "number"
        for k, v in sorted(values.items())
        if "/" not in k
    }
