"""Metrics of a task: their declaration, and the sums that their means over a split are made of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

_LOWER_IS_BETTER = frozenset(
    "loss error err perplexity ppl entropy nll mae mse rmse mape wer cer fid bits distance divergence".split()
)
"""Words, between underscores, in the names of metrics that are better lower, as far as a name can tell."""


@dataclass(frozen=True, slots=True)
class TaskMetric:
    """The declaration of a metric.

    Attributes:
        name: Its name; reports and summaries put ``test_`` or ``val_`` in front.
        doc: Its meaning, with the unit or range.
        higher_is_better: True where a larger value is better.
        form: The format specification of a value in a line of text.
        bar: Its label on the progress bar; empty: it is not shown there.
    """

    name: str
    doc: str
    higher_is_better: bool
    form: str = ".4f"
    bar: str = ""

    def __post_init__(self) -> None:
        try:
            format(0.5, self.form)
        except ValueError as error:
            raise ValueError(f"metric {self.name}: form: got {self.form!r}, expected a format of numbers: {error}") from None

    def is_better(self, value: float, other: float, by: float = 0.0) -> bool:
        """Tell if a value is better than another one by more than ``by``; any number is better than NaN."""
        if math.isnan(value) or math.isnan(other):
            return math.isnan(other) and not math.isnan(value)
        return (value - other if self.higher_is_better else other - value) > by

    def shown(self, value: float | None) -> str:
        """Format a value; a dash where there is none."""
        return "-" if value is None else format(value, self.form)


LOSS = TaskMetric("loss", "mean loss over the targets that count", higher_is_better=False)
"""The metric that every task has, and the first one of each."""


def main_metric(declared: Sequence[TaskMetric]) -> TaskMetric:
    """Return the first metric beside the loss, rather one that the progress bar shows; the loss where there is none."""
    others = [each for each in declared if each.name != LOSS.name]
    return next((each for each in (*(each for each in others if each.bar), *others)), LOSS)


def metric_named(name: str, declared: Iterable[TaskMetric] = ()) -> TaskMetric:
    """Return the declared metric of this name; of an unknown one tell by its name which direction is better."""
    for each in (*declared, LOSS):
        if each.name == name:
            return each
    words = name.lower().split("_")
    return TaskMetric(name, name, higher_is_better=_LOWER_IS_BETTER.isdisjoint(words), bar=name)


@dataclass(frozen=True, slots=True)
class Sums:
    """A sum and its count, which are added up over batches to the mean over a whole split.

    Attributes:
        total: The sum; a number, or a tensor, shape (C,), where there is a mean for each of C classes or columns.
        count: The number, or weight, of what was summed up, of the shape of the sum.
    """

    total: float | torch.Tensor
    count: float | torch.Tensor

    def __add__(self, other: Sums) -> Sums:
        mine, others = (torch.as_tensor(each.total).shape for each in (self, other))
        if mine != others:
            raise ValueError(f"got sums of the shapes {tuple(mine)} and {tuple(others)} in two batches, expected one shape")
        return Sums(self.total + other.total, self.count + other.count)

    def mean(self) -> float:
        """Return the mean; of several ones their mean, over those with a count above 0. NaN where there is none."""
        if isinstance(self.total, torch.Tensor) or isinstance(self.count, torch.Tensor):
            total, count = torch.broadcast_tensors(
                torch.as_tensor(self.total, dtype=torch.float64), torch.as_tensor(self.count, dtype=torch.float64)
            )
            counted = count > 0
            return float((total[counted] / count[counted]).mean())
        return self.total / self.count if self.count else math.nan

    @property
    def counts(self) -> bool:
        """True where anything was summed up."""
        return bool((self.count > 0).any()) if isinstance(self.count, torch.Tensor) else self.count > 0
