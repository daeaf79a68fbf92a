"""`join`: a script's model takes part in a run, and the script's own loop computes the gradients."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ormo_rpc.config.schema import Role
from ormo_rpc.errors import ConfigError
from ormo_rpc.options.imports import place_of, refuse_while_importing
from ormo_rpc.own_loop.configuring import compose_own_loop
from ormo_rpc.own_loop.evaluation import number
from ormo_rpc.own_loop.job import OwnJob, OwnModel
from ormo_rpc.own_loop.loop import JoinedWorker
from ormo_rpc.own_loop.roles import role
from ormo_rpc.runtimes.prepare import check_own_loop
from ormo_rpc.runtimes.rank_checks import DEFAULT_WORKERS
from ormo_rpc.runtimes.ranks import Ranks


def join(
    model: torch.nn.Module,
    *overrides: str,
    total_tickets: int,
    tickets_per_epoch: int | None = None,
    lr: float | Callable[[int], float] | None = None,
    run_dir: str | Path | None = None,
) -> JoinedWorker:
    """Join a run with a model of one's own; iterating over the result gives this process's work.

    Every process of the run runs the same script as far as here. What this process is depends on how it was started: a worker
    or the server under ``ormo-rpc launch`` and torchrun (rank 0 serves), one more worker of a run in progress
    (``role=worker server.address=HOST:PORT``), or alone the whole run.

    Args:
        model: The model; from now on its parameters belong to the run, to the end of the loop.
        overrides: Of the configuration, as on the command line of ``ormo-rpc``, whose own are stronger.
        total_tickets: T, the number of gradients that the run applies.
        tickets_per_epoch: Tickets that count as an epoch; by default all of them.
        lr: The learning rate, or a function of the iteration ``t``; by default that of the configuration.
        run_dir: Where the outputs go; ``outputs/DATE/TIME`` by default. Under ``ormo-rpc launch`` that has the choice.

    Raises:
        ConfigError: something is wrong; nothing was started.
    """
    refuse_while_importing()
    began = time.monotonic()
    own = OwnModel(model)
    lr = _checked(lr) if callable(lr) else lr
    first = lr(0) if callable(lr) else lr
    # A warm-up may begin at 0.
    is_rate = isinstance(first, (int, float)) and math.isfinite(first) and (first > 0 or callable(lr))  # pyright: ignore[reportUnnecessaryIsInstance] # a script gives anything
    if first is not None and not is_rate:
        raise ConfigError(
            f"lr: got {first!r} in join(), expected a number > 0, or a function of the iteration that returns one"
        )
    composed = compose_own_loop(
        overrides,
        class_name=own.class_name,
        total_tickets=total_tickets,
        tickets_per_epoch=tickets_per_epoch,
        lr=float(first) if first else None,
        lr_is_function=callable(lr),
    )
    function, config = lr if callable(lr) and composed.keeps_lr else None, composed.config
    ranks = Ranks.from_environment()
    starts_server = config.role is Role.all and (ranks is None or ranks.rank == 0)
    decided = dataclasses.replace(config, workers=config.workers or DEFAULT_WORKERS)
    check_own_loop(OwnJob(decided, own, lr=function), starts_server=starts_server)
    return JoinedWorker(
        role(config), own, lr=function, run_dir=None if run_dir is None else Path(run_dir), words=composed.words, began=began
    )


def _checked(lr: Callable[[int], Any]) -> Callable[[int], float]:
    """A script's learning rate, whose values are checked as they come."""

    def rate(iteration: int) -> float:
        value = lr(iteration)
        try:
            found = number("lr", value)
        except (TypeError, ValueError):
            found = math.nan
        if not (math.isfinite(found) and found >= 0):
            raise ConfigError(
                f"{place_of(lr)}lr: got {value!r} at iteration {iteration} from the function in join(), expected a number >= 0"
            )
        return found

    return rate
