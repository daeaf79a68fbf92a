"""The parts of a job as a configuration has them: model, evaluation, groups, wire form, server."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from ormo_rpc import devices
from ormo_rpc.algorithms._regions import TwoLevels
from ormo_rpc.algorithms.groups import Groups
from ormo_rpc.compression import PushFormat, pushed_dtype
from ormo_rpc.config.runtimes import DdpRuntime, RpcRuntime
from ormo_rpc.config.schema import Config
from ormo_rpc.config.training import Train
from ormo_rpc.data import DataSet
from ormo_rpc.kernels.compiled import fastest_kernel
from ormo_rpc.models.flat import FlatModel, Layout
from ormo_rpc.models.param_groups import param_groups
from ormo_rpc.runtimes.job_like import JobLike
from ormo_rpc.seeding import seed_for, seeded
from ormo_rpc.server.buffer_layout import BufferLayout
from ormo_rpc.server.buffer_rules import Rule
from ormo_rpc.server.buffers import RunningBuffers
from ormo_rpc.server.build import build_server
from ormo_rpc.server.events import Event
from ormo_rpc.server.loss_scale import LossScale
from ormo_rpc.server.parameter_server import ParameterServer
from ormo_rpc.server.region import RegionServer
from ormo_rpc.worker.arithmetic import set_arithmetic
from ormo_rpc.worker.evaluation import Evaluator
from ormo_rpc.worker.freed_memory import keep_freed_memory
from ormo_rpc.worker.options import Autocast

DEVICE = "worker.device"


def build_module(config: Config, data: DataSet) -> torch.nn.Module:
    """Build the configured model with the run's initial weights."""
    with seeded(config.seed, "initial weights", 0):
        return config.model.build(data.input_shape, config.task.outputs(data))


def configured_device(config: Config, process: int) -> torch.device:
    """Return the device on which the workers of a process compute; this process uses it from now on.

    Raises:
        ConfigError: this machine does not have it.
    """
    set_arithmetic(config.worker)  # a fork has an environment of its own
    relays = config.algorithm.workers_are_regions and isinstance(config.runtime, RpcRuntime)
    if config.worker.dummy or relays:  # a live region's own workers compute
        return torch.device("cpu")
    return computing_device(config, process)


def computing_device(config: Config, worker: int) -> torch.device:
    """Return the device of a process that computes gradients; this process uses it from now on, and keeps freed memory.

    Raises:
        ConfigError: this machine does not have it.
    """
    device = devices.use(devices.resolve(config.worker.device, key=DEVICE, worker=worker))
    if device.type == "cpu":
        keep_freed_memory()
    return device


def configured_evaluator(config: Config, model: FlatModel, data: DataSet) -> Evaluator:
    """Build the evaluation of a configuration; the model belongs to it from now on.

    It computes on a GPU where workers do and this machine has one, whatever the server's device.
    """
    set_arithmetic(config.worker)
    device = devices.resolve_if_there(config.worker.device, key=DEVICE)
    options = config.worker
    return Evaluator(model, data, config.task, config.train.batch_size, options.autocast.dtype, device, options.data_on_device)


def configured_scale(config: Config, model: FlatModel) -> LossScale | None:
    """Make the first scale of the losses of a server's own workers; None where nothing is computed in float16."""
    options = config.worker
    if options.autocast is not Autocast.fp16 and not model.has_half:
        return None
    return LossScale(initial=options.loss_scale, interval=options.loss_scale_interval)


def time_generator(config: Config, worker: int) -> torch.Generator:
    """Return the random generator of one worker's compute times, the same for any number of workers."""
    return torch.Generator().manual_seed(seed_for(config.seed, "time", worker))


def configured_format(
    config: Config, params: Layout, buffers: BufferLayout, dtype: torch.dtype, *, metrics: bool = False
) -> PushFormat:
    """Make the wire form of pushes of a configuration, with or without room for metrics."""
    return PushFormat(
        params=params,
        buffers=buffers,
        dtype=dtype,
        vectors=config.algorithm.VECTORS_PUSHED,
        compression=config.compression,
        wire=config.wire.dtype,
        seed=config.seed,
        metrics=metrics,
    )


def configured_groups(train: Train, params: Layout) -> Groups:
    """Make the parameter groups of a configuration.

    Raises:
        ValueError: a pattern matches no parameter.
    """
    return param_groups(
        params,
        weight_decay=train.weight_decay,
        decay_1d=train.decay_1d,
        no_decay=train.no_decay,
        lr_factors=train.lr_factors,
    )


def two_levels(config: Config) -> tuple[TwoLevels, int]:
    """Return the algorithm of a configuration whose workers are regions, and the number of each region's own workers."""
    algorithm = config.algorithm
    assert isinstance(algorithm, TwoLevels), "any other was refused"
    assert algorithm.region_workers is not None, "its workers are regions"
    return algorithm, algorithm.region_workers


def configured_region(
    config: Config,
    params: torch.Tensor,
    count: Callable[[int], int] | None = None,
    *,
    buffer_rules: Mapping[str, Rule] | None = None,
    loss_scale: LossScale | None = None,
) -> RegionServer:
    """Build the server of a region; the arguments are those of `RegionServer`."""
    algorithm, num_workers = two_levels(config)
    return RegionServer(
        algorithm.region_rule(),
        params,
        num_workers,
        algorithm.region_parts,
        count,
        buffer_rules=buffer_rules,
        loss_scale=loss_scale,
    )


def configured_server(
    job: JobLike,
    params: torch.Tensor,
    buffers: RunningBuffers | None,
    record: Callable[[Event], None],
    clock: Callable[[], float],
    groups: Groups,
    layout: Layout,
    loss_scale: LossScale | None = None,
) -> ParameterServer:
    """Build the server of a job's configuration, on the device that this has.

    Raises:
        ConfigError: this machine does not have it.
    """
    config = job.config
    device = torch.device("cpu")
    if not isinstance(config.runtime, DdpRuntime):  # whose ranks make the steps
        device = devices.resolve(config.server.device, key="server.device")
    return build_server(
        algorithm=config.algorithm,
        scheduler=config.scheduler,
        params=params.to(device),
        num_workers=config.num_workers,
        lr=job.lr,
        momentum=config.train.momentum,
        total_tickets=job.total_tickets,
        min_workers=config.runtime.min_workers,
        seed=config.seed,
        buffers=buffers,
        ema=config.evaluate.ema,
        elastic_every=config.logger.elastic_iterations,
        record=record,
        clock=clock,
        norm_limit=config.train.norm_limit,
        timer=time.perf_counter,
        kernel=fastest_kernel(params.numel(), device),
        sent_dtype=config.wire.params.rounded,
        pushed_dtype=pushed_dtype(config.compression, config.wire.dtype),
        loss_scale=loss_scale,
        process_of=config.process_of,
        groups=groups if config.algorithm.DECAYS_ITSELF else None,
        shapes=list(layout.shapes.values()),
    )
