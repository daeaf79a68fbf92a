"""Metrics: one declaration each drives metrics.jsonl, wandb, the progress bar, summary.json and the table of the report.

Those of evaluations are the task's (`TaskMetric`), and those that an own loop pushes have but a name. Any other one is a field
of `Metrics`; to add one, add a field::

    delay_90_percent: int | None = metric(
        "90% of the applied gradients have at most this delay",
        lambda at: at.statistics.delay_quantile(0.9), in_rows=Rows.interval, bar="delay 90%", column="90% delay", form=".0f",
    )
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ormo_rpc.loggers.means import Means
from ormo_rpc.loggers.statistics import Statistics
from ormo_rpc.worker.evaluation import Evaluation


class Rows(Enum):
    """Rows of metrics.jsonl, which wandb and the progress bar are given too, that have a metric."""

    none = "none"
    interval = "interval"
    """A row every ``logger.log_seconds``."""
    evaluation = "evaluation"
    """A row for each evaluation."""


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """Measurements at one moment, from which metrics are computed.

    Attributes:
        statistics: Of the events so far.
        evaluation: The newest one.
        seconds: The length of the time that rates are over, up to the last applied gradient: since the last row, or since
            the first ticket.
        applied: Gradients applied in that time.
        extra: Metrics by name that the runtime measures itself.
    """

    statistics: Statistics
    evaluation: Evaluation | None
    seconds: float
    applied: int
    extra: Mapping[str, Any]

    def evaluated(self, split: str, name: str) -> float | None:
        """Return a metric of the newest evaluation, on the split ``test`` or ``val``; None where there is none."""
        if self.evaluation is None:
            return None
        values = self.evaluation.test if split == "test" else self.evaluation.validation
        return None if values is None else values.get(name)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """The declaration of a metric.

    Attributes:
        doc: Its meaning, with the unit.
        value: Computes it; None where the runtime measures it (`Measurements.extra`).
        in_rows: The rows of metrics.jsonl that have it.
        digits: Decimal places in a row; None for all.
        bar: Its label on the progress bar; empty: it is not shown there.
        column: Its heading in the table of the report; empty: it has no column.
        form: The format specification of its value on the bar and in the table.
    """

    doc: str
    value: Callable[[Measurements], Any] | None
    in_rows: Rows
    digits: int | None
    bar: str
    column: str
    form: str

    def measure(self, name: str, at: Measurements) -> Any:
        """Compute the value, or take the runtime's; None where it was not measured."""
        return at.extra.get(name) if self.value is None else self.value(at)

    def shown(self, value: Any) -> str:
        """Format a value for the progress bar or the table."""
        return format(value, self.form)


def metric(
    doc: str,
    value: Callable[[Measurements], Any] | None = None,
    *,
    in_rows: Rows = Rows.none,
    digits: int | None = None,
    bar: str = "",
    column: str = "",
    form: str = "",
) -> Any:
    """Declare a field of `Metrics`; the arguments are those of `Metric`."""
    declared = Metric(doc=doc, value=value, in_rows=in_rows, digits=digits, bar=bar, column=column, form=form)
    return dataclasses.field(default=None, metadata={"doc": doc, "metric": declared})


@dataclass(kw_only=True)
class Metrics:
    """All metrics of a run, each a key of its summary; None where it was not measured."""

    iterations: int | None = metric("gradients applied", column="iterations", form=".0f")
    gradients_computed: int | None = metric("gradients applied or discarded", lambda at: at.statistics.gradients_computed)
    discarded: int | None = metric("gradients not applied", lambda at: at.statistics.discarded)
    cancelled: int | None = metric(
        "gradients that the algorithm cancelled, not computed to the end", lambda at: at.statistics.cancelled
    )
    repeated: int | None = metric("pushes that came again after a lost reply", lambda at: at.statistics.repeated)
    train_loss: float | None = metric(
        "mean batch loss, averaged over about the last 50 gradients",
        lambda at: at.statistics.loss,
        in_rows=Rows.interval,
        bar="loss",
        column="train loss",
        form=".4f",
    )
    test_loss: float | None = metric(
        "mean loss on the test split, over the targets that count",
        lambda at: at.evaluated("test", "loss"),
        in_rows=Rows.evaluation,
    )
    test_accuracy: float | None = metric(
        "accuracy on the test split, in [0, 1]; of tasks that have one",
        lambda at: at.evaluated("test", "accuracy"),
        in_rows=Rows.evaluation,
    )
    val_loss: float | None = metric(
        "mean loss on the validation split, over the targets that count",
        lambda at: at.evaluated("val", "loss"),
        in_rows=Rows.evaluation,
    )
    val_accuracy: float | None = metric(
        "accuracy on the validation split, in [0, 1]; of tasks that have one",
        lambda at: at.evaluated("val", "accuracy"),
        in_rows=Rows.evaluation,
    )
    updates_per_second: float | None = metric(
        "gradients applied per second, from the first ticket to the last applied gradient",
        lambda at: at.applied / at.seconds if at.seconds else None,
        in_rows=Rows.interval,
        digits=2,
    )
    delay_mean: float | None = metric(
        "mean delay of the applied gradients, in iterations; of synchronous rounds within a round",
        lambda at: at.statistics.delay_mean,
        in_rows=Rows.interval,
        digits=4,
        bar="delay",
        column="mean delay",
        form=".1f",
    )
    delay_max: int | None = metric(
        "largest delay, in iterations; of synchronous rounds within a round",
        lambda at: at.statistics.delay_max,
        in_rows=Rows.interval,
        column="max delay",
        form=".0f",
    )
    delay_median: int | None = metric("median delay, in iterations", lambda at: at.statistics.delay_quantile(0.5))
    delay_99_percent: int | None = metric(
        "delay that 99% of the applied gradients do not exceed", lambda at: at.statistics.delay_quantile(0.99)
    )
    elastic_mean: float | None = metric(
        "elastic consistency: squared distance between the parameters and what was sent with the ticket, in units of the "
        "squared learning rate, at every logger.elastic_iterations-th applied gradient: their mean",
        lambda at: at.statistics.elastic_mean,
        in_rows=Rows.interval,
    )
    elastic_max: float | None = metric("the largest of these", lambda at: at.statistics.elastic_max, in_rows=Rows.interval)
    pushes_per_worker: dict[str, int] | None = metric(
        "gradients applied or discarded, by worker",
        lambda at: {str(worker): count for worker, count in sorted(at.statistics.pushes_per_worker.items())},
    )
    loss_scale: float | None = metric("scale of the losses, where something is computed in float16", in_rows=Rows.interval)
    lock_wait_seconds: float | None = metric(
        "seconds that pushes waited for the server's lock", in_rows=Rows.interval, digits=6
    )
    lock_held_seconds: float | None = metric("seconds that the server's lock was held", in_rows=Rows.interval, digits=6)
    step_seconds: float | None = metric("seconds that the algorithm's steps and snapshots took")


METRICS: Mapping[str, Metric] = {field.name: field.metadata["metric"] for field in dataclasses.fields(Metrics)}
"""The declarations by name."""
SPLITS = ("test", "val")
"""The splits of an evaluation, as keys have them."""


def measure(at: Measurements) -> dict[str, Any]:
    """Compute all metrics; the summary has them as they are."""
    return {name: declared.measure(name, at) for name, declared in METRICS.items()}


def measure_by_name(at: Measurements) -> dict[str, float]:
    """Compute the metrics of the whole run that are declared nowhere here, by their keys in the summary."""
    return _pushed(at.statistics.metrics) | _evaluated(at)


def row_of(at: Measurements, rows: Rows) -> dict[str, Any]:
    """Compute the metrics of a row of metrics.jsonl, rounded, without those that were not measured."""
    row: dict[str, Any] = {}
    for name, declared in METRICS.items():
        if declared.in_rows is rows:
            value = declared.measure(name, at)
            if value is not None:
                row[name] = value if declared.digits is None else round(value, declared.digits)
    if rows is Rows.interval:
        return row | _pushed(at.statistics.recent_metrics)
    return row | _evaluated(at)


def key_of(split: str, name: str) -> str:
    """The key of a metric of evaluations on the split ``test`` or ``val``."""
    return f"{split}_{name}"


def metric_of(key: str) -> tuple[str, str] | None:
    """Split ``test`` or ``val``, and name, of a metric of evaluations; None for a key of anything else."""
    split, _, name = key.partition("_")
    return (split, name) if split in SPLITS and name else None


def _pushed(metrics: Means) -> dict[str, float]:
    return {f"train_{name}": mean for name, mean in metrics.means().items()}


def _evaluated(at: Measurements) -> dict[str, float]:
    if at.evaluation is None:
        return {}
    found = zip(SPLITS, (at.evaluation.test, at.evaluation.validation or {}), strict=True)
    named = {key_of(split, name): value for split, values in found for name, value in values.items()}
    return {key: value for key, value in named.items() if key not in METRICS}
