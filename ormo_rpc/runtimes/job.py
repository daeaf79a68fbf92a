"""A job: what a configuration means in data, model, server and worker. Every process and runtime builds its parts here."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ormo_rpc.compression import Allocate, PushFormat, pushed_dtype
from ormo_rpc.config.schema import Config
from ormo_rpc.data import Epochs
from ormo_rpc.kernels.compiled import fastest_kernel
from ormo_rpc.models.flat import FlatModel, Layout
from ormo_rpc.seeding import seed_for
from ormo_rpc.server.buffers import RunningBuffers
from ormo_rpc.server.build import build_server
from ormo_rpc.server.events import Event
from ormo_rpc.server.lr_schedule import LearningRate
from ormo_rpc.server.parameter_server import ParameterServer
from ormo_rpc.worker.dummy import DummyWorker
from ormo_rpc.worker.evaluation import Evaluation, evaluate
from ormo_rpc.worker.worker import Worker

Evaluator = Callable[[Tensor, Mapping[str, Tensor]], Evaluation]
"""From parameters, shape (D,), and batch-norm statistics by name to the quality of the model."""
Exporter = Callable[[Mapping[str, Any]], dict[str, Tensor]]
"""From a server's state to a ``state_dict`` in plain PyTorch."""


class JobLike(Protocol):
    """What a session needs to know of a job."""

    config: Config
    total_tickets: int
    batches_per_epoch: int
    lr: Callable[[int], float]

    def server(self, record: Callable[[Event], None], clock: Callable[[], float]) -> ParameterServer:
        """The parameter server at iteration 0."""
        ...

    def push_format(self) -> PushFormat:
        """The wire form of its pushes."""
        ...

    def epoch(self, iteration: int) -> float:
        """How many epochs that many applied gradients are."""
        ...

    def evaluator(self) -> Evaluator | None:
        """How to evaluate parameters; None where there is no test set."""
        ...

    def exporter(self) -> Exporter:
        """How to make a ``state_dict`` in plain PyTorch."""
        ...


class Job:
    """Training a model on data.

    Args:
        config: The configuration, with the number of workers decided.

    Attributes:
        data: Training and test split.
        epochs: Which samples a ticket means.
        batches_per_epoch: Tickets in an epoch.
        total_tickets: T, how many pushes the run applies.
        lr: The scheduled learning rate.

    Raises:
        ValueError: the data set is missing or damaged.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.data = config.dataset.load()
        self.epochs = Epochs(len(self.data.train), config.train.batch_size * config.algorithm.steps, config.seed)
        self.batches_per_epoch = self.epochs.batches_per_epoch
        total = self.epochs.total_tickets(config.train.epochs)
        self.total_tickets = min(total, config.train.max_iterations or total)
        self.lr: LearningRate = config.learning_rate(self.batches_per_epoch, self.total_tickets)

    def model(self) -> FlatModel:
        """A model with the run's initial weights, the same in every process."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(self.config.seed, "initial weights", 0))
            module = self.config.model.build(self.data.input_shape, self.data.num_classes)
        return FlatModel(module)

    def push_format(self) -> PushFormat:
        """The wire form of this job's pushes: the same on the server as on its workers."""
        return self._push_format(self.model())

    def _push_format(self, model: FlatModel) -> PushFormat:
        return configured_format(self.config, model.params, model.buffers, model.dtype)

    def worker(self, allocate: Allocate | None = None) -> Worker:
        """A worker with a model of its own, or one that stands in for it and computes nothing.

        Args:
            allocate: Makes the memory of what it sends, given its bytes: a uint8 tensor of zeros at a multiple of 64; torch's
                own by default.
        """
        train, model = self.config.train, self.model()
        kind = DummyWorker if self.config.worker.dummy else Worker
        return kind(
            model,
            self.data.train,
            self.epochs,
            self.config.algorithm,
            seed=self.config.seed,
            momentum=train.momentum,
            weight_decay=train.weight_decay,
            clip_norm=train.clip_norm,
            wire_format=self._push_format(model),
            allocate=allocate,
        )

    def server(self, record: Callable[[Event], None], clock: Callable[[], float]) -> ParameterServer:
        """The parameter server at iteration 0."""
        model = self.model()
        buffers = RunningBuffers(model.statistics(), model.buffer_momentum())
        return configured_server(self, model.flat_params(), buffers, record, clock)

    def epoch(self, iteration: int) -> float:
        """How many epochs that many applied gradients are."""
        return iteration / self.batches_per_epoch

    def evaluator(self) -> Evaluator | None:
        """Evaluates on the test split, with a model of its own; None where the workers compute nothing."""
        if self.config.worker.dummy:
            return None
        model = self.model()
        return lambda params, statistics: evaluate(model, params, statistics, self.data.test)

    def exporter(self) -> Exporter:
        """Makes a ``state_dict``, with a model of its own."""
        model = self.model()

        def export(state: Mapping[str, Any]) -> dict[str, Tensor]:
            buffers = state["buffers"]
            average = {name: buffers[f"average.{name}"] for name in model.buffers.shapes}
            return model.state_dict(state["params"], average, buffers["updates"])

        return export


def time_generator(config: Config, worker: int) -> torch.Generator:
    """The source of chance of one worker's speed, independent of how many others there are."""
    return torch.Generator().manual_seed(seed_for(config.seed, "time", worker))


def configured_format(config: Config, params: Layout, buffers: Layout, dtype: torch.dtype) -> PushFormat:
    """The wire form of pushes that a configuration asks for."""
    return PushFormat(
        params=params,
        buffers=buffers,
        dtype=dtype,
        vectors=config.algorithm.VECTORS_PUSHED,
        compression=config.compression,
        wire=config.wire.dtype,
        seed=config.seed,
    )


def configured_server(
    job: JobLike,
    params: Tensor,
    buffers: RunningBuffers | None,
    record: Callable[[Event], None],
    clock: Callable[[], float],
) -> ParameterServer:
    """The server that a job's configuration asks for."""
    config = job.config
    return build_server(
        algorithm=config.algorithm,
        scheduler=config.scheduler,
        params=params,
        num_workers=config.num_workers,
        lr=job.lr,
        momentum=config.train.momentum,
        total_tickets=job.total_tickets,
        min_workers=config.runtime.min_workers,
        seed=config.seed,
        buffers=buffers,
        record=record,
        clock=clock,
        norm_limit=config.train.norm_limit,
        timer=time.perf_counter,
        kernel=fastest_kernel(params.numel()),
        sent_dtype=config.wire.params.rounded,
        pushed_dtype=pushed_dtype(config.compression, config.wire.dtype),
        process_of=config.process_of,
    )
