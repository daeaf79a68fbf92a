"""The evaluations of a run by one metric: which is the best, and whether the run is to stop early."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ormo_rpc.config.schema import Config
from ormo_rpc.errors import ConfigError
from ormo_rpc.tasks.metrics import TaskMetric
from ormo_rpc.worker.evaluation import Evaluation

NOT_EVALUATED = "but nothing is evaluated with synthetic gradients or worker.dummy=true; leave it out"
"""The reason why there is nothing to choose by."""


def check_choice(config: Config, *, evaluated: bool) -> None:
    """Refuse to choose by a metric that evaluations do not have, and to stop by the test split where nobody has said so.

    Args:
        config: The configuration of the run.
        evaluated: There are evaluations.

    Raises:
        ConfigError: the metric cannot be used.
    """
    if not evaluated and config.evaluate.targets:
        raise ConfigError(f"evaluate.targets: got {config.evaluate.targets}, {NOT_EVALUATED}")
    if not config.keeps_best:
        return
    patience, name = config.evaluate.patience, config.searched_metric
    asked = "checkpoint.best: got true" if patience is None else f"evaluate.patience: got {patience}"
    if not evaluated:
        raise ConfigError(f"{asked}, {NOT_EVALUATED}")
    split, _, metric = name.partition("_")
    metrics = [each.name for each in config.task.all_metrics()]
    if split not in ("test", "val") or (metric not in metrics and not config.task.OPEN_METRICS):
        splits = ("val", "test") if config.dataset.has_validation else ("test",)
        known = ", ".join(f"{each}_{metric}" for each in splits for metric in metrics)
        raise ConfigError(f"optimized_metric: got {name} with {asked.split(':')[0]}, expected a metric of evaluations: {known}")
    if patience is not None and split == "test" and config.optimized_metric is None and not config.task.CHOOSES_DATA:
        raise ConfigError(
            f"{asked} without a validation split; set dataset.validation=0.1, return one beside train and test, or set "
            "optimized_metric=test_loss to stop by the test split, which then no longer tells what the model does with data "
            "that nothing was chosen by"
        )


class Ranking:
    """Compares evaluations by `Config.searched_metric`; NaN is never better.

    Args:
        config: The configuration of the run.
        metric: Returns the declaration of a metric, by its name in evaluations.

    Attributes:
        name: The metric, such as ``val_loss``.
    """

    def __init__(self, config: Config, metric: Callable[[str], TaskMetric]) -> None:
        self.name = config.searched_metric
        self._metric = metric
        self._options = config.evaluate
        self._values: list[tuple[int, float]] = []
        """Iteration and value of each evaluation, in order."""

    def value_of(self, evaluation: Evaluation) -> float:
        """Return the value of the metric.

        Raises:
            ConfigError: an evaluation has no such metric.
        """
        split, _, name = self.name.partition("_")
        splits = {"test": evaluation.test, "val": evaluation.validation or {}}
        if name not in splits.get(split, {}):
            known = ", ".join(f"{each}_{key}" for each, values in splits.items() for key in values)
            raise ConfigError(f"optimized_metric: got {self.name}, expected one of those that evaluations have: {known}")
        return splits[split][name]

    def better(self, value: float, than: float | None, by: float = 0.0) -> bool:
        """Tell whether one value is better than another one, or the first that is a number."""
        return self._metric(self.name.partition("_")[2]).is_better(value, math.nan if than is None else than, by)

    def add(self, iteration: int, evaluation: Evaluation) -> None:
        """Take note of an evaluation; it replaces those of later iterations, which a crash has undone.

        Raises:
            ConfigError: it has no such metric.
        """
        value = self.value_of(evaluation)
        self._values = [(at, each) for at, each in self._values if at < iteration] + [(iteration, value)]

    @property
    def reason(self) -> str | None:
        """The reason to stop early, in words; None where the run is to go on."""
        patience = self._options.patience
        if patience is None:
            return None
        best, since = self._since_best()
        if since < patience:
            return None
        reached = "ever was a number" if best is None else f"was better than the {best[1]:.6g} of iteration {best[0]}"
        delta = f" by more than evaluate.min_delta={self._options.min_delta:g}" if self._options.min_delta else ""
        return f"evaluate.patience={patience}: for {since} evaluations no {self.name} {reached}{delta}"

    def state_dict(self) -> dict[str, Any]:
        """Return all evaluations so far, as plain values."""
        return {"metric": self.name, "values": [list(each) for each in self._values]}

    def load_state_dict(self, state: Mapping[str, Any] | None, iteration: int) -> None:
        """Restore what `state_dict` returned, up to an iteration; those by another metric do not count."""
        if state is not None and state["metric"] == self.name:
            self._values = [(at, value) for at, value in state["values"] if at <= iteration]

    def _since_best(self) -> tuple[tuple[int, float] | None, int]:
        """Return the last evaluation that was better than those before, and the number of evaluations since."""
        best: tuple[int, float] | None = None
        since = 0
        for iteration, value in self._values:
            since += 1
            if self.better(value, None if best is None else best[1], 0.0 if best is None else self._options.min_delta):
                best, since = (iteration, value), 0
        return best, since
