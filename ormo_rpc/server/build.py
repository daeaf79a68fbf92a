"""Building a parameter server from names and numbers, with every argument checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ormo_rpc import algorithms
from ormo_rpc.kernels.kernel import Kernel
from ormo_rpc.schedulers import base as schedulers
from ormo_rpc.server.buffers import RunningBuffers
from ormo_rpc.server.events import Event
from ormo_rpc.server.parameter_server import ParameterServer
from ormo_rpc.server.validation import NormLimit, all_finite


def build_server(
    *,
    params: Tensor,
    num_workers: int,
    algorithm: str = "ormo",
    scheduler: str = "async",
    lr: float | Callable[[int], float] = 0.1,
    momentum: float = 0.9,
    total_tickets: int | None = None,
    min_workers: int = 1,
    buffers: RunningBuffers | None = None,
    record: Callable[[Event], None] = lambda _: None,
    clock: Callable[[], float] = lambda: 0.0,
    timer: Callable[[], float] = lambda: 0.0,
    norm_limit: NormLimit | None = None,
    kernel: Kernel | None = None,
    sent_dtype: torch.dtype | None = None,
    pushed_dtype: torch.dtype | None = None,
    process_of: Callable[[int], int] = lambda worker: worker,
    **options: Any,
) -> ParameterServer:
    """Build a parameter server in this process, without any network: the object that every runtime drives.

    Args:
        params: ``w_0``, shape (D,), float32 or float64; copied.
        num_workers: The number of workers, numbered from 0.
        algorithm: The algorithm's name.
        scheduler: The scheduler's name.
        lr: The learning rate ``eta``, or a function of the iteration ``t``.
        momentum: ``beta``, in [0, 1).
        total_tickets: T, how many gradients to apply; None for no end.
        min_workers: While fewer are members, no ticket is handed out.
        buffers: The running average of buffers that come with the pushes; none by default.
        record: Called with every event, in order.
        clock: Seconds since the start, for the events.
        timer: Seconds of the processor's clock, to tell how long the steps take; by default nobody is told.
        norm_limit: The limit to the norm of what is pushed; none by default.
        kernel: What the server goes over its vectors with; plain torch by default, `fastest_kernel` finds a better one.
        sent_dtype: What parameters are rounded to when they are handed out; as they are by default.
        pushed_dtype: What pushes are of, bfloat16 or float16; by default the dtype of ``params``.
        process_of: From a worker to its process; by default each is its own. See `ParameterServer`.
        options: Options of the algorithm and of the scheduler.

    Raises:
        ValueError: something is unknown or out of range.
    """
    algorithm_class, scheduler_class = algorithms.find(algorithm), schedulers.find(scheduler)
    algorithm_options, rest = _take_options(algorithm_class.Options, options)
    scheduler_options, rest = _take_options(scheduler_class.Options, rest)
    if rest:
        known = sorted({*_option_names(algorithm_class.Options), *_option_names(scheduler_class.Options)})
        raise ValueError(
            f"build_server: got the unknown option {sorted(rest)[0]!r}, expected one of {known} for {algorithm}, {scheduler}"
        )
    if scheduler in algorithm_class.REFUSES:
        raise ValueError(
            f"scheduler: got {scheduler!r}, which {algorithm} does not run under: {algorithm_class.REFUSES[scheduler]}"
        )
    if params.dim() != 1 or params.dtype not in (torch.float32, torch.float64) or params.numel() == 0:
        raise ValueError(
            f"params: got shape {tuple(params.shape)} of {params.dtype}, expected one dimension of float32 or float64"
        )
    if not all_finite(params):
        raise ValueError("params: got NaN or infinity, expected finite numbers")
    if num_workers < 1:
        raise ValueError(f"num_workers: got {num_workers}, expected at least 1")
    if min_workers < 1:
        raise ValueError(f"min_workers: got {min_workers}, expected at least 1")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum: got {momentum}, expected a number in [0, 1)")
    if total_tickets is not None and total_tickets < 1:
        raise ValueError(f"total_tickets: got {total_tickets}, expected at least 1, or None for no end")
    if not callable(lr) and not (math.isfinite(lr) and lr >= 0):
        raise ValueError(f"lr: got {lr}, expected a finite number >= 0 or a function of the iteration")
    if pushed_dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"pushed_dtype: got {pushed_dtype}, expected torch.bfloat16 or torch.float16, or None")
    if norm_limit is not None and not (math.isfinite(norm_limit.limit) and norm_limit.limit > 0):
        raise ValueError(f"norm_limit: got the limit {norm_limit.limit}, expected a finite number > 0")
    instance = algorithm_class(params.detach().clone(), momentum=momentum, options=algorithm_options)
    # One of its own, as it remembers the newest parameters.
    instance.kernel = dataclasses.replace(kernel or Kernel(), rounds=sent_dtype is torch.bfloat16)
    return ParameterServer(
        instance,
        scheduler_class(scheduler_options),
        num_workers=num_workers,
        lr=lr if callable(lr) else lambda _: lr,
        total_tickets=total_tickets,
        min_workers=min_workers,
        norm_limit=norm_limit,
        buffers=buffers,
        record=record,
        clock=clock,
        timer=timer,
        sent_dtype=sent_dtype,
        pushed_dtype=pushed_dtype,
        process_of=process_of,
    )


def _take_options(section: type[Any], options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Build a section from those options that are its own; return it and the rest."""
    fields = {field.name: field for field in dataclasses.fields(section) if field.name != "name"}
    own = {name: _as_choice(section, fields[name], value) for name, value in options.items() if name in fields}
    return section(**own), {name: value for name, value in options.items() if name not in own}


def _as_choice(section: type[Any], field: dataclasses.Field[Any], value: Any) -> Any:
    """A member of an enum by its value, for an option that is one; any other option as it is."""
    choices = type(field.default)
    if not issubclass(choices, Enum) or isinstance(value, choices):
        return value
    try:
        return choices(value)
    except ValueError:
        names = ", ".join(str(choice.value) for choice in choices)
        raise ValueError(f"{section.key(field.name)}: got {value!r}, expected one of {names}") from None


def _option_names(section: type[Any]) -> set[str]:
    return {field.name for field in dataclasses.fields(section)} - {"name"}
