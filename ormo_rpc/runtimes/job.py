"""A job: data, model, server and worker of a configuration. Every process and runtime builds them here."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch

from ormo_rpc import devices
from ormo_rpc.algorithms.groups import Groups
from ormo_rpc.compression import Allocate, PushFormat
from ormo_rpc.config.schema import Config
from ormo_rpc.data import Epochs, Split
from ormo_rpc.data.checksum import checksum_of_labels
from ormo_rpc.data.placing import placed
from ormo_rpc.data.tickets import TicketParts
from ormo_rpc.kernels.page_locked import zeros
from ormo_rpc.models.fingerprint import CHECKSUM, Fingerprint
from ormo_rpc.models.flat import FlatModel, sha256
from ormo_rpc.runtimes.configured import (
    build_module,
    configured_device,
    configured_evaluator,
    configured_format,
    configured_groups,
    configured_region,
    configured_scale,
    configured_server,
    two_levels,
)
from ormo_rpc.runtimes.job_like import Exporter
from ormo_rpc.server.buffers import RunningBuffers
from ormo_rpc.server.events import Event
from ormo_rpc.server.lr_schedule import LearningRate
from ormo_rpc.server.parameter_server import ParameterServer
from ormo_rpc.server.region import RegionServer
from ormo_rpc.tasks.metrics import TaskMetric
from ormo_rpc.worker.arithmetic import set_arithmetic
from ormo_rpc.worker.dummy import DummyWorker
from ormo_rpc.worker.evaluation import Evaluator
from ormo_rpc.worker.graphs import GraphWorker
from ormo_rpc.worker.worker import Worker


class Job:
    """A job that trains a model on data.

    Args:
        config: The configuration, with the number of workers decided.

    Attributes:
        data: Training and test split.
        epochs: The samples of each ticket.
        batches_per_epoch: Tickets in an epoch.
        total_tickets: T, the number of gradients that the run applies.
        lr: The scheduled learning rate.
        guessing_loss: The mean loss of a model that has learnt nothing; 0 where it is unknown.

    Raises:
        ValueError: the data set is missing or damaged.
    """

    SAME_MODEL: str = "draw from torch, random or numpy.random, which are seeded"
    """The remedy where processes do not make the same model and data set, for messages."""

    def __init__(self, config: Config) -> None:
        self.config = config
        set_arithmetic(config.worker)
        self.data = config.dataset.load_splits(config.seed)
        self.epochs = Epochs(
            len(self.data.train),
            config.train.batch_size * config.algorithm.steps,
            config.seed,
            weights=self.data.weights,
            in_order=self.data.in_order,
        )
        self.batches_per_epoch = self.epochs.batches_per_epoch
        total = self.epochs.total_tickets(config.train.epochs)
        self.total_tickets = min(total, config.train.max_iterations or total)
        self.lr: LearningRate = config.learning_rate(self.batches_per_epoch, self.total_tickets)
        self.guessing_loss = config.task.guessing_loss(self.data)
        self._built: Fingerprint | None = None
        """Of the first model that was built, without the data set."""
        self._fingerprint: Fingerprint | None = None
        self._push_format: PushFormat | None = None
        self._groups: Groups | None = None
        self._spare: list[FlatModel] = []
        """Models that nobody has used, since a large one takes long to build."""
        self._placed: dict[torch.device, Split] = {}

    def model(self) -> FlatModel:
        """Build a model with the run's initial weights, which are the same in every process.

        Raises:
            ValueError: it cannot be trained, or it is not the one that was built before.
        """
        return self._spare.pop() if self._spare else self._new_model()

    def prepare_models(self, count: int) -> None:
        """Build this many models for those who ask for one next.

        Raises:
            ValueError: as `model` does.
        """
        self._spare += [self._new_model() for _ in range(count)]

    def _new_model(self) -> FlatModel:
        module = build_module(self.config, self.data)
        model = FlatModel(module)
        self._check_same(module)
        return model

    @contextlib.contextmanager
    def reading_model(self) -> Generator[FlatModel]:
        """Lend a model for reading; the next one who asks gets it."""
        model = self.model()
        yield model
        self._spare.append(model)

    def fingerprint(self) -> Fingerprint:
        """Return what other processes, checkpoints and a replay must have in common with this job."""
        if self._fingerprint is None:
            if self._built is None:
                self.prepare_models(1)
            assert self._built is not None, "a model was built"
            data = {
                "training samples": len(self.data.train),
                "batches per epoch": self.batches_per_epoch,
                CHECKSUM: checksum_of_labels(self.data, self.config.seed),
            }
            self._fingerprint = dataclasses.replace(self._built, data=data)
        return self._fingerprint

    def _check_same(self, module: torch.nn.Module) -> None:
        """Refuse a model whose frozen parameters or buffers differ from one construction to the next."""
        fingerprint = Fingerprint.of(module)
        self._built = self._built or fingerprint
        difference = self._built.difference(fingerprint, "the first model", "the second", buffer_values=True)
        if difference is not None:
            raise ValueError(
                f"{difference}, although both were built with the same seed; {self.SAME_MODEL}, or load them from a file"
            )

    def initial_digest(self) -> Callable[[], bytes]:
        """Return a function, for any thread, that hashes the trainable parameters of a newly built model, in 32 bytes."""
        with self.reading_model() as model:
            params = [each.detach() for each in model.trainable.values()]  # whoever takes the model binds it to other memory
        return lambda: bytes.fromhex(sha256(*params))

    def push_format(self) -> PushFormat:
        """Return the wire form of pushes, the same on the server as on its workers."""
        if self._push_format is None:
            with self.reading_model() as model:
                self._push_format = configured_format(self.config, model.params, model.buffers.layout, model.dtype)
        return self._push_format

    def device(self, process: int) -> torch.device:
        """Return the device on which the workers of a process compute; this process uses it from now on.

        Raises:
            ConfigError: this machine does not have it.
        """
        return configured_device(self.config, process)

    def worker(self, allocate: Allocate | None = None, device: torch.device | None = None) -> Worker:
        """Build a worker with a model of its own, or a `DummyWorker`, which has no use for a device.

        Args:
            allocate: Allocates the memory of its pushes: given a number of bytes, a uint8 tensor of zeros, 64-byte aligned.
                By default torch allocates it, on the device.
            device: The device that it computes on; by default the CPU.
        """
        train = self.config.train
        device = torch.device("cpu") if device is None or self.config.worker.dummy else device
        kind = DummyWorker if self.config.worker.dummy else Worker
        if self.config.worker.cuda_graph and device.type == "cuda":
            kind = functools.partial(GraphWorker, self.model().to(device))
        # These may have to build a model, which the worker then takes.
        wire_format, groups = self.push_format(), self.groups()
        return kind(
            self.model().to(device),
            self.training_data(device),
            self.epochs,
            self.config.algorithm,
            seed=self.config.seed,
            momentum=train.momentum,
            groups=groups,
            clip_norm=train.clip_norm,
            task=self.config.task,
            channels_last=self.config.worker.channels_last,
            accumulate=self.config.worker.accumulate,
            autocast=self.config.worker.autocast.dtype,
            compile=self.config.worker.compile,
            wire_format=wire_format,
            allocate=allocate,
        )

    def worker_here(self) -> Worker:
        """Build a worker for a server in this process, on the device of workers; its pushes are where the server takes them."""
        device = self.device(0)
        if device == devices.resolve(self.config.server.device, key="server.device"):
            return self.worker(None, device)
        return self.worker(functools.partial(zeros, page_locked=device.type == "cuda"), device)

    def training_data(self, device: torch.device) -> Split:
        """The training split for a worker on a device, placed once for all workers of this process."""
        if device not in self._placed:
            self._placed[device] = placed(self.data.train, device, self.config.worker.data_on_device)
        return self._placed[device]

    def server(self, record: Callable[[Event], None], clock: Callable[[], float]) -> ParameterServer:
        """Build the parameter server at iteration 0; it calls ``record`` with each event, timed by ``clock``."""
        with self.reading_model() as model:
            params, buffers = model.flat_params(), RunningBuffers(model.buffers.tensors, model.buffers.rules)
            layout, loss_scale = model.params, configured_scale(self.config, model)
        if self.config.algorithm.workers_are_regions:
            loss_scale = None  # each region has one
        return configured_server(self, params, buffers, record, clock, self.groups(), layout, loss_scale)

    def region(self, params: torch.Tensor) -> RegionServer:
        """Build the server of a region at the parameters that its first reply has, one or more vectors of D."""
        algorithm, _ = two_levels(self.config)
        parts = TicketParts(self.epochs, algorithm.region_parts)
        with self.reading_model() as model:
            return configured_region(
                self.config,
                params,
                functools.partial(parts.count, steps=algorithm.local_steps),
                buffer_rules=model.buffers.rules,
                loss_scale=configured_scale(self.config, model),
            )

    def groups(self) -> Groups:
        """Return the parameter groups.

        Raises:
            ValueError: a pattern matches no parameter.
        """
        if self._groups is None:
            with self.reading_model() as model:
                self._groups = configured_groups(self.config.train, model.params)
        return self._groups

    def epoch(self, iteration: int) -> float:
        """Return the number of epochs that this many applied gradients are."""
        return iteration / self.batches_per_epoch

    def evaluator(self) -> Evaluator | None:
        """Return an evaluation on the splits that are not trained on, with a model of its own; None for dummy workers."""
        if self.config.worker.dummy:
            return None
        return configured_evaluator(self.config, self.model(), self.data)

    def metric(self, name: str) -> TaskMetric:
        """Return the declaration of a metric by its name in evaluations, from which that of an unknown one is guessed."""
        return self.config.task.metric(name)

    def exporter(self) -> Exporter:
        """Return a function that makes a ``state_dict``, with a model of its own."""
        model = self.model()

        def export(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
            return model.state_dict(state["params"], state["buffers"])

        return export


@dataclasses.dataclass(frozen=True)
class LoadedJob:
    """A job that a process was forked with.

    Attributes:
        text: Its configuration, as YAML.
        job: With data, and models that nobody has used.
    """

    text: str
    job: Job


def job_of(text: str, loaded: LoadedJob | None, parse: Callable[[str], Config]) -> Job:
    """Take the job that was loaded, if it is that of the text, else load it.

    Args:
        text: The configuration as YAML.
        loaded: What this process was forked with.
        parse: Reads the text.
    """
    return loaded.job if loaded is not None and loaded.text == text else Job(parse(text))
