"""Records: what the server tells about itself, one event at a time. They are never part of the update path."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Kind(Enum):
    """What an event tells."""

    issue = "issue"
    reissue = "reissue"
    apply = "apply"
    discard = "discard"
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
        kind: What happened.
        seconds: When, since the server's clock began.
        data: The particulars, of plain JSON types.
    """

    kind: Kind
    seconds: float
    data: Mapping[str, Any]

    def line(self) -> dict[str, Any]:
        """The event as one JSON object of ``trace.jsonl``."""
        return {"event": self.kind.value, "seconds": round(self.seconds, 6), **self.data}


@dataclass(kw_only=True)
class Statistics:
    """Running figures over the events of a run; their size depends on the number of workers and delays only."""

    iterations: int = 0
    gradients_computed: int = 0
    discarded: int = 0
    repeated: int = 0
    pushes_per_worker: Counter[int] = field(default_factory=Counter[int])
    delays: Counter[int] = field(default_factory=Counter[int])
    delay_sum_per_worker: Counter[int] = field(default_factory=Counter[int])
    loss: float | None = None
    """Mean loss of the batches, averaged exponentially over about the last 50 gradients."""

    def state_dict(self) -> dict[str, Any]:
        """The figures as plain values, a private copy."""
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        for name, value in state.items():
            setattr(self, name, Counter(value) if isinstance(value, dict) else value)

    def observe(self, event: Event) -> None:
        """Take one event into account."""
        data = event.data
        if event.kind is Kind.apply:
            self.iterations = data["iteration"] + 1
            self.delays[data["delay"]] += 1
            self.delay_sum_per_worker[data["worker"]] += data["delay"]
            if data["loss"] is not None:
                self.loss = data["loss"] if self.loss is None else self.loss + (data["loss"] - self.loss) / 50
        if event.kind is Kind.discard:
            self.discarded += 1
        if event.kind in (Kind.apply, Kind.discard):
            self.gradients_computed += 1
            self.pushes_per_worker[data["worker"]] += 1
        if event.kind is Kind.repeat:
            self.repeated += 1

    def delay_counts(self) -> list[int]:
        """How many applied gradients had the delay 0, 1, ..., delay_max."""
        return [self.delays[delay] for delay in range(self.delay_max + 1)]

    def delay_quantile(self, part: float) -> int:
        """The smallest delay that at least this part of the applied gradients does not exceed."""
        wanted, seen = part * self.delays.total(), 0
        for delay, count in sorted(self.delays.items()):
            seen += count
            if seen >= wanted:
                return delay
        return 0

    @property
    def delay_mean(self) -> float:
        """Mean delay of the applied gradients, in iterations."""
        return sum(delay * count for delay, count in self.delays.items()) / max(1, self.delays.total())

    @property
    def delay_max(self) -> int:
        """Largest delay of an applied gradient, in iterations."""
        return max(self.delays, default=0)
