"""The entry of a summary that a sweep searches by (``optimized_metric``): whether it exists, and which direction is better."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args, get_type_hints

from ormo_rpc.errors import ConfigError
from ormo_rpc.loggers.metrics import SPLITS, key_of, metric_of
from ormo_rpc.storage.summary import BY_NAME, Summary
from ormo_rpc.tasks import Task
from ormo_rpc.tasks.metrics import TaskMetric

_TRAIN_LOSS = "train_loss"
_PUSHED = "train_"


def refuse_metric(name: str | None, task: Task | None, *, validation: bool = True) -> None:
    """Refuse a value of ``optimized_metric`` that no summary has as a number.

    Args:
        name: The value.
        task: The task of the run; None where it is not known yet.
        validation: There is a validation split.

    Raises:
        ConfigError: no summary has it.
    """
    if name is None:
        return
    names = [each.name for each in task.all_metrics()] if task is not None else []
    evaluated = [key_of(split, each) for split in SPLITS for each in names]
    hints = {key: kind for key, kind in get_type_hints(Summary).items() if key != BY_NAME and metric_of(key) is None}
    numbers = [key for key, kind in hints.items() if set(get_args(kind)) & {int, float}]
    later = (task is None or task.OPEN_METRICS) and (metric_of(name) is not None or name.startswith(_PUSHED))
    if name not in (*numbers, *evaluated) and not later:
        raise ConfigError(f"optimized_metric: got {name!r}, expected one of {', '.join(sorted((*numbers, *evaluated)))}")
    if name.startswith("val_") and not validation:
        raise ConfigError(
            f"optimized_metric: got {name} without a validation split; set dataset.validation=0.1, "
            "or return one beside train and test"
        )


def higher_is_better(name: str, metric: Callable[[str], TaskMetric]) -> bool | None:
    """Tell if a larger value of an entry of the summary is better; None where it is neither a loss nor of evaluations.

    Args:
        name: The entry.
        metric: Declares a metric of evaluations by its name there.
    """
    found = metric_of(name)
    if found is None:
        return False if name == _TRAIN_LOSS else None
    return metric(found[1]).higher_is_better
