"""Tasks (one file each): what a batch is, the loss that is trained, and the metrics of an evaluation."""

from __future__ import annotations

from ormo_rpc.tasks.base import Task, UnfitTargets
from ormo_rpc.tasks.classification import Classification
from ormo_rpc.tasks.metrics import LOSS, Sums, TaskMetric

__all__ = ["LOSS", "Classification", "Sums", "Task", "TaskMetric", "UnfitTargets"]
