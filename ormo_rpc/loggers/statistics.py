"""Running statistics over the events of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ormo_rpc.server.events import Event, Kind

LOSS_WINDOW = 50
"""Gradients over which the training loss is averaged, exponentially."""


@dataclass(kw_only=True)
class Statistics:
    """Counts and delays over the events so far; their size depends on the number of workers and of distinct delays only.

    Attributes:
        iterations: Gradients applied, those before a resumed run's checkpoint included.
        gradients_computed: Gradients applied or discarded.
        discarded: Gradients that the server did not apply.
        repeated: Pushes that arrived again after their reply was lost.
        pushes_per_worker: Gradients applied or discarded, by worker.
        delays: Applied gradients, by delay.
        delay_sum_per_worker: Sum of the delays of the applied gradients, by worker.
        loss: Mean batch loss, averaged exponentially over about the last `LOSS_WINDOW` gradients.
    """

    iterations: int = 0
    gradients_computed: int = 0
    discarded: int = 0
    repeated: int = 0
    pushes_per_worker: Counter[int] = field(default_factory=Counter[int])
    delays: Counter[int] = field(default_factory=Counter[int])
    delay_sum_per_worker: Counter[int] = field(default_factory=Counter[int])
    loss: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics as plain values, copied."""
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, value in state.items():
            setattr(self, name, Counter(value) if isinstance(value, dict) else value)

    def observe(self, event: Event) -> None:
        """Update the statistics by one event."""
        data = event.data
        if event.kind is Kind.apply:
            self.iterations = data["iteration"] + 1
            self.delays[data["delay"]] += 1
            self.delay_sum_per_worker[data["worker"]] += data["delay"]
            if data["loss"] is not None:
                self.loss = data["loss"] if self.loss is None else self.loss + (data["loss"] - self.loss) / LOSS_WINDOW
        if event.kind is Kind.discard:
            self.discarded += 1
        if event.kind in (Kind.apply, Kind.discard):
            self.gradients_computed += 1
            self.pushes_per_worker[data["worker"]] += 1
        if event.kind is Kind.repeat:
            self.repeated += 1

    @property
    def applied(self) -> int:
        """Gradients applied by this run itself, which may have begun at a checkpoint."""
        return self.delays.total()

    @property
    def delay_mean(self) -> float:
        """Mean delay of the applied gradients, in iterations."""
        return sum(delay * count for delay, count in self.delays.items()) / max(1, self.applied)

    @property
    def delay_max(self) -> int:
        """Largest delay of an applied gradient, in iterations."""
        return max(self.delays, default=0)

    def delay_counts(self) -> list[int]:
        """Count the applied gradients with the delays 0, 1, ..., `delay_max`."""
        return [self.delays[delay] for delay in range(self.delay_max + 1)]

    def delay_quantile(self, fraction: float) -> int:
        """Return the smallest delay that at least this fraction of the applied gradients does not exceed."""
        target, seen = fraction * self.applied, 0
        for delay, count in sorted(self.delays.items()):
            seen += count
            if seen >= target:
                return delay
        return 0
