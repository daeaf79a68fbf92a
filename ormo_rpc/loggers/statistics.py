"""Running statistics over the events of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ormo_rpc.loggers.means import Means
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
        cancelled: Gradients that were not computed to the end, as the algorithm cancelled them.
        repeated: Pushes that arrived again after their reply was lost.
        pushes_per_worker: Gradients applied or discarded, by worker.
        applied_per_worker: Applied gradients, by worker.
        delays: Applied gradients, by delay.
        delay_sum_per_worker: Sum of the delays of the applied gradients, by worker.
        loss: Mean batch loss over about the last `LOSS_WINDOW` gradients: over all of them until there are so many, then an
            exponential average.
        losses: Applied gradients that had a loss.
        start_loss: Mean batch loss of the applied gradients with the smallest stamp, those at the initial parameters.
        start_losses: The number of these gradients.
        start_stamp: Their stamp.
        elastic_count: Applied gradients at which elastic consistency was measured.
        elastic_sum: Sum of these measurements.
        elastic_max: The largest of them.
        seconds: Time of the last applied gradient, on the run's clock.
        metrics: Means of what was pushed beside the applied gradients.
        recent_metrics: Those since the last row of metrics.jsonl.
    """

    iterations: int = 0
    gradients_computed: int = 0
    discarded: int = 0
    cancelled: int = 0
    repeated: int = 0
    pushes_per_worker: Counter[int] = field(default_factory=Counter[int])
    applied_per_worker: Counter[int] = field(default_factory=Counter[int])
    delays: Counter[int] = field(default_factory=Counter[int])
    delay_sum_per_worker: Counter[int] = field(default_factory=Counter[int])
    loss: float | None = None
    losses: int = 0
    start_loss: float | None = None
    start_losses: int = 0
    start_stamp: int | None = None
    elastic_count: int = 0
    elastic_sum: float = 0.0
    elastic_max: float | None = None
    seconds: float = 0.0
    metrics: Means = field(default_factory=Means)
    recent_metrics: Means = field(default_factory=Means)

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics as plain values, copied."""
        return {name: dict(value) if isinstance(value, (Counter, Means)) else value for name, value in vars(self).items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, now or in an earlier version."""
        for name, value in state.items():
            setattr(self, name, type(getattr(self, name))(value) if isinstance(value, dict) else value)
        if self.loss is not None and "losses" not in state:
            self.losses = self.applied
        if "applied_per_worker" not in state:
            self._count_applied_per_worker()

    def begin_as(self, state: Mapping[str, Any]) -> None:
        """Take over the loss at the start from the state of the run that this one continues; count anew."""
        for name in ("start_loss", "start_losses", "start_stamp"):
            setattr(self, name, state.get(name, getattr(self, name)))

    def observe(self, event: Event) -> None:
        """Update the statistics by one event."""
        data = event.data
        if event.kind is Kind.apply:
            self.iterations = data["iteration"] + 1
            self.delays[data["delay"]] += 1
            self.applied_per_worker[data["worker"]] += 1
            self.delay_sum_per_worker[data["worker"]] += data["delay"]
            self.seconds = max(self.seconds, event.seconds)
            if data["loss"] is not None:
                self._observe_loss(data["loss"], data["stamp"])
            if event.elastic is not None:
                self.elastic_count += 1
                self.elastic_sum += event.elastic
                self.elastic_max = max(self.elastic_max or 0.0, event.elastic)
            if "metrics" in data:
                self.metrics.add(data["metrics"])
                self.recent_metrics.add(data["metrics"])
        if event.kind is Kind.discard:
            self.discarded += 1
        if event.kind is Kind.cancel:
            self.cancelled += 1
        if event.kind in (Kind.apply, Kind.discard):
            self.gradients_computed += 1
            self.pushes_per_worker[data["worker"]] += 1
        if event.kind is Kind.repeat:
            self.repeated += 1

    def _count_applied_per_worker(self) -> None:
        """Take the pushes for the applied gradients of an earlier version; where some were discarded, whose is not known."""
        self.applied_per_worker = Counter(self.pushes_per_worker)
        if self.discarded:
            self.applied_per_worker.clear()
            self.delay_sum_per_worker.clear()  # means begin here

    def _observe_loss(self, loss: float, stamp: int) -> None:
        self.losses += 1
        self.loss = _moved(self.loss, loss, min(self.losses, LOSS_WINDOW))
        if self.start_stamp is None or stamp < self.start_stamp:
            self.start_loss, self.start_losses, self.start_stamp = None, 0, stamp
        if stamp == self.start_stamp:
            self.start_losses += 1
            self.start_loss = _moved(self.start_loss, loss, self.start_losses)

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

    def delay_means(self) -> dict[int, float]:
        """Return the mean delay of the applied gradients of each worker that has some."""
        return {worker: self.delay_sum_per_worker[worker] / n for worker, n in sorted(self.applied_per_worker.items())}

    @property
    def elastic_mean(self) -> float | None:
        """Mean of the measurements of elastic consistency; None where there is none."""
        return self.elastic_sum / self.elastic_count if self.elastic_count else None

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


def _moved(mean: float | None, value: float, count: int) -> float:
    """Move a mean by a new value, which is one of ``count``."""
    return value if mean is None else mean + (value - mean) / count
