"""The targets of a run (``evaluate.targets``): when its evaluations first reached each of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ormo_rpc.config.runtimes import SimRuntime
from ormo_rpc.config.schema import Config
from ormo_rpc.errors import ConfigError
from ormo_rpc.loggers.metrics import SPLITS
from ormo_rpc.tasks.metrics import TaskMetric, main_metric
from ormo_rpc.worker.evaluation import Evaluation

MIXED = "mixed"
"""The clock of evaluations some of which have virtual seconds, and others real ones."""
ROUNDING = 1e-12
"""The part of a target by which a mean may miss it: three times 0.35 is 1.0499999999999998."""


@dataclass(frozen=True, slots=True)
class _Point:
    """An evaluation: iteration and time of its parameters, and the value of the metric on each split that has one."""

    iteration: int
    seconds: float
    values: Mapping[str, float]


class Targets:
    """The evaluations of a run by the task's main metric, and the first of them at which a target was reached.

    A target is reached when the mean of the last ``evaluate.smooth`` evaluations is as good: not by fewer, not by values that
    are not finite, and not in between two evaluations. The moment is that of the newest one's parameters: their iteration, and
    the run's clock then. What an evaluation itself takes does not count. An iteration is a ticket, of as many gradients as the
    algorithm has local steps.

    A run that is resumed goes on with the evaluations of the former one, and its seconds count from the beginning of that; not
    where one of them is simulated and the other is not, as virtual and real seconds have no sum (see `check_clock`).

    Args:
        config: The configuration of the run.
        metric: Returns the declaration of a metric, by its name in evaluations.
    """

    def __init__(self, config: Config, metric: Callable[[str], TaskMetric]) -> None:
        self._targets, self._smooth = config.evaluate.targets, config.evaluate.smooth
        self._steps = config.algorithm.steps
        self._declared = metric
        self._metric: TaskMetric | None = None
        """That of the points; None before there is one."""
        self._points: list[_Point] = []
        self._clock = clock_of(config)
        """That of the seconds; `MIXED` where a run without targets continues one of another clock."""
        self._before = 0.0
        """Seconds of the runs that this one continues on a clock of its own."""

    @property
    def last_iteration(self) -> int:
        """The iteration of the newest evaluation; 0 where there is none."""
        return self._points[-1].iteration if self._points else 0

    def add(self, iteration: int, seconds: float, evaluation: Evaluation) -> None:
        """Take note of an evaluation; it replaces those of later iterations, which a crash has undone."""
        self._metric = self._metric or main_metric([self._declared(name) for name in evaluation.test])
        splits = dict(zip(SPLITS, (evaluation.test, evaluation.validation or {}), strict=True))
        values = {split: found[self._metric.name] for split, found in splits.items() if self._metric.name in found}
        self._points = [each for each in self._points if each.iteration < iteration]
        self._points.append(_Point(iteration, self._before + seconds, values))

    def summary_entries(self) -> dict[str, Any]:
        """Return the entries of the summary; all None where there are no targets, or on a split without the metric."""
        entries: dict[str, Any] = {"target_metric": None if not self._targets or self._metric is None else self._metric.name}
        for split in SPLITS:
            prefix = "" if split == "test" else f"{split}_"
            there = bool(self._targets) and (split == "test" or any(split in each.values for each in self._points))
            reached = {repr(target): self._reached(split, target) for target in self._targets}
            seconds = {target: None if point is None else point.seconds for target, point in reached.items()}
            gradients = {target: None if point is None else point.iteration * self._steps for target, point in reached.items()}
            entries[f"{prefix}seconds_to"] = seconds if there else None
            entries[f"{prefix}gradients_to"] = gradients if there else None
        return entries

    def _reached(self, split: str, target: float) -> _Point | None:
        """Return the first evaluation at which a target was reached on a split."""
        points = [each for each in self._points if split in each.values]
        for last in range(self._smooth, len(points) + 1):
            values = [each.values[split] for each in points[last - self._smooth : last]]
            if self._metric is None or not all(map(math.isfinite, values)):
                continue
            if not self._metric.is_better(target, math.fsum(values) / self._smooth, ROUNDING * abs(target)):
                return points[last - 1]
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return all evaluations so far, as plain values."""
        return {
            "metric": None if self._metric is None else self._metric.name,
            "points": [[each.iteration, each.seconds, dict(each.values)] for each in self._points],
            "before": self._before,
            "clock": self._clock,
        }

    def load_state_dict(self, state: Mapping[str, Any] | None, iteration: int, *, seconds: float) -> None:
        """Restore what `state_dict` returned, up to an iteration.

        Args:
            state: None of a checkpoint of an earlier version.
            iteration: That of the checkpoint.
            seconds: The seconds of the former run, where this one has a clock of its own; else 0.
        """
        if state is not None and state.get("clock", self._clock) != self._clock:
            self._clock = MIXED
        self._before = seconds if state is None else state["before"] + seconds
        if state is not None and state["metric"] is not None:
            self._metric = self._declared(state["metric"])
            self._points = [_Point(at, when, values) for at, when, values in state["points"] if at <= iteration]


def clock_of(config: Config) -> str:
    """The clock of a run's seconds."""
    return "virtual" if isinstance(config.runtime, SimRuntime) else "real"


def check_clock(config: Config, then: Config, state: Mapping[str, Any] | None, path: Path) -> None:
    """Refuse the targets of a run that continues one of another clock.

    Args:
        config: The configuration of the run.
        then: That of the run it continues.
        state: What `Targets.state_dict` returned then; None of a checkpoint of an earlier version.
        path: The checkpoint.

    Raises:
        ConfigError: the seconds until one of them would be virtual and real ones.
    """
    own, former = clock_of(config), (state or {}).get("clock", clock_of(then))
    if own != former:
        raise ConfigError(
            f"evaluate.targets: got {list(config.evaluate.targets)} in a run of {own} seconds that continues {path}, whose "
            f"seconds are {former}, expected none, as the two have no sum; metrics.jsonl of each run has its evaluations"
        )
