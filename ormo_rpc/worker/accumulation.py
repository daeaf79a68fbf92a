"""Gradient accumulation: a batch goes through the model in parts, so that the memory of one part is enough."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ormo_rpc.data import trees
from ormo_rpc.tasks import Task


def micro_batches(task: Task, batch: Any, parts: int) -> Iterator[tuple[int, Any, float]]:
    """Cut a batch into parts, whose sizes differ by one sample at most, and weigh each by its targets that count.

    The losses of the parts, times these weights, add up to the loss of the batch, and so do the gradients: where a sample's
    output depends on that sample alone, and the loss is a mean over the targets that count. Batch norms see each part by
    itself.

    Args:
        task: Counts.
        batch: A tree of tensors, each with a row for each sample.
        parts: The number of parts; there are fewer where there are fewer samples.

    Returns:
        Number, samples and weight of each part in which a target counts; the weights sum to 1.

    Raises:
        ValueError: the batch cannot be cut.
    """
    size = trees.size(batch)
    parts = min(parts, size)
    bounds = [size * part // parts for part in range(parts + 1)]
    cut = [trees.narrow(batch, bounds[part], bounds[part + 1]) for part in range(parts)]
    counts = [task.count(part) for part in cut]
    total = sum(counts)
    for number, (part, count) in enumerate(zip(cut, counts, strict=True)):
        if count:
            yield number, part, count / total
