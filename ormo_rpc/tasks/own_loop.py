"""The task of a loop of the user's own: metrics whose names come with the first evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from typing_extensions import override

from ormo_rpc.options import register
from ormo_rpc.tasks.base import Task
from ormo_rpc.tasks.metrics import TaskMetric, metric_named

NO_REPLAY = (
    "its gradients come from a script, where nothing ensures that they are functions of the parameters and the ticket, so the "
    "run cannot be computed again to the bit"
)
"""The reason why such a run cannot be replayed, for messages."""


def own_metric(name: str, higher_is_better: Sequence[str] = ()) -> TaskMetric:
    """Return the declaration of a metric of which only the name is known.

    Args:
        name: The name.
        higher_is_better: All metrics that are better higher; where it is empty, names tell (`metric_named`).
    """
    guessed = metric_named(name)
    return dataclasses.replace(
        guessed,
        higher_is_better=name in higher_is_better if higher_is_better else guessed.higher_is_better,
        form=".2%" if "accuracy" in name else guessed.form,
    )


@register("own_loop")
@dataclass(frozen=True, kw_only=True)
class OwnLoopTask(Task):
    """The loss of a script that calls `ormo_rpc.join`, which computes it and evaluates by itself."""

    OPEN_METRICS = True
    CHOOSES_DATA = True

    @override
    def metric(self, name: str) -> TaskMetric:
        return own_metric(name)

    @override
    def loss(self, output: Any, batch: Any) -> NoReturn:
        raise ValueError(_NO_TASK)

    @override
    def count(self, batch: Any) -> NoReturn:
        raise ValueError(_NO_TASK)

    @override
    def sums(self, output: Any, batch: Any) -> Mapping[str, Any]:
        raise ValueError(_NO_TASK)


_NO_TASK = "task: own_loop is that of a script which calls ormo_rpc.join(model, ...); start the script, see docs/own_loop.md"
