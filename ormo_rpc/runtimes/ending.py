"""Status and reason of a run that has ended by itself, as its summary has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ormo_rpc.config.runtimes import DdpRuntime
from ormo_rpc.loggers.statistics import Statistics
from ormo_rpc.runtimes.job_like import JobLike
from ormo_rpc.server.loss_scale import SMALLEST
from ormo_rpc.server.parameter_server import Status

OVERFLOWED = f"gradients overflow float16 at every loss scale down to {SMALLEST:.17g}"
"""The reason where that is why."""
PARAMETERS = "the parameters are not finite"
"""The reason where the run diverged by its parameters."""
GRADIENTS = "the gradients or losses of two workers for one ticket are not finite, or too large"
"""The reason where they are finite, and the server says that the run diverged."""
LOSS_OF_A_RANK = "the loss of a rank is not finite"
"""The same of a run without a server."""


def ending(
    job: JobLike,
    statistics: Statistics,
    status: str,
    iteration: int,
    *,
    stopped: str | None = None,
    loss_scale: Mapping[str, Any] | None = None,
    finite: bool = True,
) -> dict[str, str | None]:
    """Return the entries ``status`` and ``reason`` of a summary.

    Args:
        job: The run.
        statistics: Of all its events.
        status: The server's status.
        iteration: Gradients applied.
        stopped: The reason why it was stopped early, where it was.
        loss_scale: The state of the loss scale, where there is one.
        finite: The parameters are.
    """
    if status == Status.diverged.value:
        overflowed = loss_scale is not None and loss_scale["value"] < SMALLEST
        others = LOSS_OF_A_RANK if isinstance(job.config.runtime, DdpRuntime) else GRADIENTS
        return {"status": status, "reason": OVERFLOWED if overflowed else others if finite else PARAMETERS}
    if status != Status.completed.value:
        return {"status": status, "reason": None}
    diverged, early = _divergence(job, statistics), _early(job, iteration, stopped)
    return {
        "status": status if diverged is None else Status.diverged.value,
        "reason": "; ".join(filter(None, (diverged, early))) or None,
    }


def _divergence(job: JobLike, statistics: Statistics) -> str | None:
    """Say why a run counts as diverged though its parameters are finite; None where it does not.

    Its mean loss over the last gradients is above ``train.divergence_factor`` times the larger of two losses: of the gradients
    at the initial parameters, and of guessing. The second one keeps a fine-tuning that starts at a tiny loss from being called
    diverged for its noise.
    """
    factor, start, last = job.config.train.divergence_factor, statistics.start_loss, statistics.loss
    if factor is None or start is None or last is None:
        return None
    if not math.isfinite(last):
        return f"the training loss is not finite in the end; at the start it was {start:.4g}"
    reference = max(start, job.guessing_loss)
    if reference <= 0 or last <= factor * reference:  # a loss of any sign has no factor that tells
        return None
    guessing = f" (and of the {job.guessing_loss:.4g} of guessing)" if job.guessing_loss else ""
    return (
        f"the training loss ended at {last:.4g}, above train.divergence_factor={factor:g} times the {start:.4g} at the start"
        f"{guessing}"
    )


def _early(job: JobLike, iteration: int, stopped: str | None) -> str | None:
    """Say that a run was finished before all its gradients were applied."""
    if iteration >= job.total_tickets:
        return None
    limit, epochs, total = job.config.train.max_seconds, job.epoch(iteration), job.epoch(job.total_tickets)
    cause = stopped or ("finished early" if limit is None else f"train.max_seconds={limit:g}")
    return f"{cause}: ended after {epochs:.2f} of {total:g} epochs, {iteration} of {job.total_tickets} iterations"
