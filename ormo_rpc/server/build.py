"""`build_server`: a parameter server with every argument checked."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from ormo_rpc.algorithms import Algorithm
from ormo_rpc.algorithms.groups import Groups, check_groups
from ormo_rpc.kernels.kernel import Kernel
from ormo_rpc.options import Part, find
from ormo_rpc.options.instantiate import is_registered
from ormo_rpc.options.values import build
from ormo_rpc.schedulers import Scheduler, incompatibility
from ormo_rpc.seeding import generator
from ormo_rpc.server.assignments import Assignments
from ormo_rpc.server.buffers import RunningBuffers
from ormo_rpc.server.elastic import ElasticConsistency
from ormo_rpc.server.ema import Ema
from ormo_rpc.server.events import Event, EventLog
from ormo_rpc.server.loss_scale import LossScale
from ormo_rpc.server.members import Members
from ormo_rpc.server.parameter_server import ParameterServer
from ormo_rpc.server.resumable import DIMENSION, SHAPES, WORKERS, refuse_forgetful
from ormo_rpc.server.snapshots import Snapshots
from ormo_rpc.server.validation import NormLimit, all_finite

P = TypeVar("P", bound=Part)

TRAINED_DTYPES = (torch.float32, torch.float64)
"""The dtypes that parameters may have."""


def build_server(
    *,
    params: torch.Tensor,
    num_workers: int,
    algorithm: str | Algorithm = "ormo",
    scheduler: str | Scheduler = "async",
    lr: float | Callable[[int], float] = 0.1,
    momentum: float = 0.9,
    total_tickets: int | None = None,
    min_workers: int = 1,
    seed: int = 0,
    buffers: RunningBuffers | None = None,
    ema: float | None = None,
    record: Callable[[Event], None] = lambda _: None,
    clock: Callable[[], float] = lambda: 0.0,
    timer: Callable[[], float] = lambda: 0.0,
    norm_limit: NormLimit | None = None,
    kernel: Kernel | None = None,
    sent_dtype: torch.dtype | None = None,
    pushed_dtype: torch.dtype | None = None,
    loss_scale: LossScale | None = None,
    process_of: Callable[[int], int] = lambda worker: worker,
    groups: Groups | None = None,
    shapes: Sequence[Sequence[int]] | None = None,
    elastic_every: int = 0,
    **options: Any,
) -> ParameterServer:
    """Build a parameter server in this process, without any network: the object that every runtime drives.

    Args:
        params: ``w_0``, shape (D,), float32 or float64; copied. Their device, the CPU or a GPU, is that of the server.
        num_workers: The number of workers, numbered from 0.
        algorithm: The algorithm, or its name; an object is copied, not changed.
        scheduler: The scheduler, or its name; copied as well.
        lr: The learning rate ``eta``, or a function of the iteration ``t``.
        momentum: ``beta``, in [0, 1).
        total_tickets: T, how many gradients to apply; None for no end.
        min_workers: While fewer are members, no ticket is handed out.
        seed: The seed of a scheduler that draws.
        buffers: The buffers of the model, copied to the device; none by default.
        ema: The decay of a moving average of the parameters, in (0, 1); by default there is none.
        record: Called with every event, in order.
        clock: Seconds since the start, for the events.
        timer: Monotonic seconds, to measure the steps; by default they are not measured.
        norm_limit: The limit to the norm of a push; none by default.
        kernel: Implementation of the steps and copies; plain torch by default, `fastest_kernel` finds a faster one.
        sent_dtype: The dtype that parameters are rounded to when they are sent; by default they are not.
        pushed_dtype: The dtype of pushes, bfloat16 or float16; by default that of ``params``.
        loss_scale: The first scale of the losses of workers that compute in float16; copied. None for no scale.
        process_of: From a worker to its process; by default each is its own. See `ParameterServer`.
        groups: Weight decay and learning-rate factor of each range of ``params``, for an algorithm that `DECAYS_ITSELF`; by
            default one group without decay.
        shapes: The shapes of the tensors that lie contiguous in ``params``, for an algorithm that works on each of them; by
            default it is one tensor.
        elastic_every: Measure `ElasticConsistency` at every so many applied gradients; 0: never.
        options: Options of the algorithm and of the scheduler, where these are given by name.

    Raises:
        ValueError: a name or option is unknown or out of range, or the algorithm does not run under the scheduler.
    """
    unknown = dict(options)
    own_algorithm = _copy_or_build(Algorithm, algorithm, unknown)
    own_scheduler = _copy_or_build(Scheduler, scheduler, unknown)
    if unknown:
        raise ValueError(
            f"build_server: got the unknown option {min(unknown)!r}, expected one of {_option_names(algorithm, scheduler)} "
            f"for {own_algorithm.name}, {own_scheduler.name}"
        )
    refused = incompatibility(own_algorithm, own_scheduler)
    if refused is not None:
        raise ValueError(refused)
    if params.dim() != 1 or params.dtype not in TRAINED_DTYPES or params.numel() == 0:
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
    if ema is not None and not 0 < ema < 1:
        raise ValueError(f"ema: got {ema}, expected a number in (0, 1)")
    if pushed_dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"pushed_dtype: got {pushed_dtype}, expected torch.bfloat16 or torch.float16, or None")
    if norm_limit is not None and not (math.isfinite(norm_limit.limit) and norm_limit.limit > 0):
        raise ValueError(f"norm_limit: got the limit {norm_limit.limit}, expected a finite number > 0")
    if groups is not None and not own_algorithm.DECAYS_ITSELF:
        raise ValueError(
            f"groups: got {len(groups)}, expected None with {own_algorithm.name}: weight decay and factors of the learning "
            "rate are part of a worker's gradient"
        )
    if shapes is not None and sum(math.prod(shape) for shape in shapes) != params.numel():
        raise ValueError(
            f"shapes: got {sum(math.prod(shape) for shape in shapes)} elements in {len(shapes)} tensors, expected "
            f"{params.numel()}, those of params"
        )
    own_algorithm.init(params.detach().clone(), momentum)
    if shapes is not None:
        own_algorithm.shapes = tuple(tuple(shape) for shape in shapes)
    if groups is not None:
        check_groups(groups, params.numel())
        own_algorithm.groups = groups
    # One of its own, as it remembers the newest parameters.
    own_algorithm.kernel = dataclasses.replace(kernel or Kernel(), rounds=sent_dtype is torch.bfloat16)
    own_scheduler.init(generator(seed, "scheduler", 0))
    return ParameterServer(
        algorithm=own_algorithm,
        scheduler=own_scheduler,
        num_workers=num_workers,
        lr=lr if callable(lr) else lambda _: lr,
        members=Members(own_scheduler),
        assignments=Assignments(total_tickets, process_of),
        snapshots=Snapshots(own_algorithm, sent_dtype),
        buffers=RunningBuffers({}) if buffers is None else buffers.to(params.device),
        ema=None if ema is None else Ema(ema, params),
        events=EventLog(record, clock),
        min_workers=min_workers,
        norm_limit=norm_limit,
        pushed_dtype=pushed_dtype,
        loss_scale=None if loss_scale is None else dataclasses.replace(loss_scale),
        elastic=ElasticConsistency(elastic_every) if elastic_every else None,
        timer=timer,
        before_first_save=functools.partial(check_resumable, own_algorithm, own_scheduler),
    )


def check_resumable(algorithm: Algorithm, scheduler: Scheduler) -> None:
    """Refuse an algorithm or scheduler that forgets a part of its state, by a trial; see `refuse_forgetful`.

    Those of the package are not tried: its tests hold them to it.

    Raises:
        ValueError: one does; the message names it and the attributes that it leaves out.
    """
    if is_registered(type(algorithm)) and is_registered(type(scheduler)):
        return

    def new_server() -> ParameterServer:
        return build_server(
            algorithm=algorithm,
            scheduler=scheduler,
            params=torch.zeros(DIMENSION),
            shapes=SHAPES,
            num_workers=WORKERS,
            lr=lambda iteration: 0.1 / (1 + iteration % 3),
        )

    refuse_forgetful(new_server)


def _copy_or_build(base: type[P], given: str | P, options: dict[str, Any]) -> P:
    """Copy a part, without its running state; or build it by its name, taking its options out of ``options``."""
    if isinstance(given, base):
        return build(type(given), {name: getattr(given, name) for name in given.declared()})
    if not isinstance(given, str):
        raise ValueError(
            f"{base.PATH}: got a {type(given).__name__}, expected a name or an object of a subclass of {base.__name__}"
        )
    cls: type[P] = find(base.PATH, given)
    return build(cls, {name: options.pop(name) for name in cls.declared() if name in options})


def _option_names(*given: str | Part) -> list[str]:
    """Return the options of the parts that are given by name."""
    named = [find(base.PATH, each) for base, each in zip((Algorithm, Scheduler), given, strict=True) if isinstance(each, str)]
    return sorted(name for part in named for name in part.declared())
