"""Events of the server, as the trace records them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ormo_rpc.algorithms.base import PushContext
from ormo_rpc.messages import Push
from ormo_rpc.server.assignments import Assignment
from ormo_rpc.server.push_metrics import as_json
from ormo_rpc.server.validation import ValidatedPush


class Kind(Enum):
    """The kind of an event."""

    issue = "issue"
    reissue = "reissue"
    apply = "apply"
    discard = "discard"
    cancel = "cancel"
    repeat = "repeat"
    join = "join"
    leave = "leave"
    pause = "pause"
    proceed = "proceed"
    checkpoint = "checkpoint"
    resume = "resume"
    finish = "finish"
    end = "end"


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the trace.

    Attributes:
        kind: Its kind.
        seconds: Its time on the server's clock, which begins at 0.
        data: Its further fields, of plain JSON types.
        elastic: `ElasticConsistency` at an applied gradient, where it was measured; not in the trace.
    """

    kind: Kind
    seconds: float
    data: Mapping[str, Any]
    elastic: float | None = None

    def line(self) -> dict[str, Any]:
        """Return the event as one JSON object of ``trace.jsonl``."""
        return {"event": self.kind.value, "seconds": round(self.seconds, 6), **self.data}


class EventLog:
    """Records the server's events.

    Args:
        record: Called with each event, in order.
        clock: Seconds since the start of the run.
    """

    def __init__(self, record: Callable[[Event], None], clock: Callable[[], float]) -> None:
        self.record = record
        self.clock = clock

    def add(self, kind: Kind, **data: Any) -> None:
        """Record an event that happens now."""
        self.record(Event(kind, self.clock(), data))

    def applied(
        self, push: Push, context: PushContext, validated: ValidatedPush, lr: float, elastic: float | None = None
    ) -> None:
        """Record that a gradient was applied with the learning rate ``lr``; its sum is kept as evidence."""
        data = dict(
            iteration=context.iteration,
            worker=push.worker,
            ticket=push.ticket,
            stamp=context.stamp,
            bucket=context.bucket,
            delay=context.delay,
            eta=lr,
            loss=push.loss,
            samples=push.samples,
            grad_sum=validated.grad_sum.hex(),
            **({} if validated.clipped_norm is None else {"clipped_norm": validated.clipped_norm.hex()}),
            **({"metrics": as_json(push.metrics)} if push.metrics else {}),
        )
        self.record(Event(Kind.apply, self.clock(), data, elastic))

    def discarded(self, assignment: Assignment, iteration: int, grad_sum: float, reason: str) -> None:
        """Record that the gradient of an assignment was not applied, at an iteration and for a reason."""
        self.add(
            Kind.discard,
            worker=assignment.worker,
            ticket=assignment.ticket,
            stamp=assignment.stamp,
            bucket=assignment.bucket,
            delay=iteration - assignment.stamp,
            reason=reason,
            grad_sum=grad_sum.hex(),
        )
