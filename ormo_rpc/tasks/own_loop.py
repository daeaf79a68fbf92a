"""The task of a loop of the user's own: metrics whose names come with the first evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from typing_extensions import override

from ormo_rpc.options import register
from ormo_rpc.tasks.base import Task
from ormo_rpc.tasks.metrics import TaskMetric

_HIGHER_IS_BETTER = ("accuracy", "f1", "iou", "auc", "r2", "bleu")
"""Parts of the names of metrics that are better higher, where nobody has said which are."""
NO_REPLAY = (
    "its gradients come from a script, where nothing ensures that they are functions of the parameters and the ticket, so the "
    "run cannot be computed again to the bit"
)
"""Why there is no replay of such a run."""


def own_metric(name: str, higher_is_better: Sequence[str] = ()) -> TaskMetric:
    """Return the declaration of a metric of which only the name is known.

    Args:
        name: It.
        higher_is_better: The names of those that are better higher; where there are none, the name itself tells.
    """
    higher = name in higher_is_better if higher_is_better else any(part in name.lower() for part in _HIGHER_IS_BETTER)
    form = ".2%" if "accuracy" in name else ".4f"
    return TaskMetric(name, name, higher_is_better=higher, form=form, bar="" if name == "loss" else name)


@register("own_loop")
@dataclass(frozen=True, kw_only=True)
class OwnLoopTask(Task):
    """The loss of a script that calls `ormo_rpc.join`, which computes it and evaluates by itself."""

    OPEN_METRICS = True

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
