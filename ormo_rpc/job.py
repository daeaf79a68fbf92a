"""A job: what a configuration means in data, model, server and worker. Every process and runtime builds its parts here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from ormo_rpc import algorithms
from ormo_rpc.buffers import RunningBuffers
from ormo_rpc.build import build_server
from ormo_rpc.config import Config
from ormo_rpc.data import DataSet, Epochs
from ormo_rpc.flat import FlatModel
from ormo_rpc.learning_rate import LearningRate
from ormo_rpc.records import Event
from ormo_rpc.seeding import seed_for
from ormo_rpc.server import ParameterServer
from ormo_rpc.worker import Worker


@dataclass(frozen=True)
class Job:
    """The parts of one run that do not change in its course.

    Attributes:
        config: The configuration.
        data: Training and test split.
        epochs: Which samples a ticket means.
        total_tickets: T, how many gradients the run applies.
        lr: The scheduled learning rate.
    """

    config: Config
    data: DataSet
    epochs: Epochs
    total_tickets: int
    lr: LearningRate

    @classmethod
    def of(cls, config: Config) -> Job:
        """Load the data and work out the length of the run.

        Raises:
            ValueError: the data set is missing or damaged.
        """
        data = config.dataset.load()
        epochs = Epochs(len(data.train), config.train.batch_size * config.algorithm.steps, config.seed)
        total = epochs.total_tickets(config.train.epochs)
        if config.train.max_iterations is not None:
            total = min(total, config.train.max_iterations)
        return cls(config, data, epochs, total, config.learning_rate(epochs.batches_per_epoch, total))

    def model(self) -> FlatModel:
        """A model with the run's initial weights, the same in every process."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(self.config.seed, "initial weights", 0))
            module = self.config.model.build(self.data.input_shape, self.data.num_classes)
        return FlatModel(module)

    def worker(self) -> Worker:
        """A worker with a model of its own."""
        train = self.config.train
        return Worker(
            self.model(),
            self.data.train,
            self.epochs,
            algorithms.find(self.config.algorithm.name),
            seed=self.config.seed,
            momentum=train.momentum,
            weight_decay=train.weight_decay,
            clip_norm=train.clip_norm,
        )

    def server(self, record: Callable[[Event], None], clock: Callable[[], float]) -> ParameterServer:
        """The parameter server at iteration 0."""
        config, model = self.config, self.model()
        options = {**asdict(config.algorithm), **asdict(config.scheduler)}
        del options["name"]
        return build_server(
            algorithm=config.algorithm.name,
            scheduler=config.scheduler.name,
            params=model.flat_params(),
            num_workers=config.num_workers,
            lr=self.lr,
            momentum=config.train.momentum,
            total_tickets=self.total_tickets,
            buffers=RunningBuffers(model.statistics(), model.buffer_momentum()),
            record=record,
            clock=clock,
            **options,
        )

    def epoch(self, iteration: int) -> float:
        """How many epochs that many applied gradients are."""
        return iteration / self.epochs.batches_per_epoch

    def time_generator(self, worker: int) -> torch.Generator:
        """The source of chance of one worker's speed."""
        return torch.Generator().manual_seed(seed_for(self.config.seed, "time", worker))
