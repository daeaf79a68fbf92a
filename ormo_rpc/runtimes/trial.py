"""One trial batch in the launcher, so that a model that cannot be trained on its data is refused before anything starts."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import re
from collections.abc import Callable, Generator
from typing import Any

import torch

from ormo_rpc.data import Split, trees
from ormo_rpc.errors import ConfigError, ModelRefused, one_line
from ormo_rpc.messages import no_buffers
from ormo_rpc.models.flat import FlatModel
from ormo_rpc.models.pass_checks import check_passes, warn_of_views
from ormo_rpc.models.passes import Passes
from ormo_rpc.runtimes.job import Job
from ormo_rpc.seeding import generator, seeded
from ormo_rpc.tasks import UnfitTargets
from ormo_rpc.worker.evaluation import Evaluator

_log = logging.getLogger(__name__)


def try_job(job: Job) -> None:
    """Train and evaluate one batch with a model that is thrown away; random states are left as they were.

    An epoch that ends with a batch of a single sample has that one tried as well, since batch norms refuse it.

    Raises:
        ConfigError: a batch cannot be made, the model cannot be trained or evaluated on it, or its output does not fit.
    """
    with seeded(job.config.seed, "trial", 0), torch.enable_grad():
        model = job.model()
        initial = model.flat_params(), model.buffers.copy()
        former = [parameter.detach() for parameter in model.trainable.values()]
        model.bind(initial[0])
        trial = Trial(job, model)
        for ticket in _tickets(job):
            trial.train(*_smallest_batch(job, ticket))
        warn_of_views(model.module, former)
        evaluator = Evaluator(model, job.data, job.config.task)
        trial.evaluate("test", job.data.test, evaluator, *initial)
        if job.data.validation is not None:
            trial.evaluate("validation", job.data.validation, evaluator, *initial)


class Trial:
    """The batches that are tried, and how their failures are put.

    Args:
        job: The run.
        model: A model for the trial alone.
    """

    def __init__(self, job: Job, model: FlatModel) -> None:
        self.job = job
        self.model = model
        self.task = job.config.task
        self.passes = Passes(model)
        self.data_name = job.config.dataset.known_as
        self.model_name = job.config.model.known_as

    def train(self, number: int, indices: torch.Tensor) -> None:
        """Compute the gradient of one training batch, as a worker does.

        Args:
            number: The number of the batch in the run, which seeds its random draws.
            indices: The numbers of its samples.

        Raises:
            ConfigError: it cannot be computed, or changes what no pass may change.
        """
        where, losses = f"training batch {number}", list[float]()
        if len(indices) == 1:
            where += " (a single sample; another train.batch_size makes it larger)"
        augmentation = generator(self.job.config.seed, "augment", number)
        with seeded(self.job.config.seed, "forward", number):
            batch = self._batch(where, lambda: self.job.data.train.batch(indices, augmentation))

        def compute() -> None:
            with seeded(self.job.config.seed, "forward", number):
                losses.append(self._train(where, copy.deepcopy(batch)))

        try:
            check_passes(self.model.module, compute)
        except ModelRefused as error:
            raise ConfigError(f"{self._place(where)}: {str(error).removeprefix('model: ')}") from None
        if not math.isfinite(losses[0]):
            _log.warning("%s: the loss is %s at the initial weights", self._place(where), losses[0])

    def _train(self, where: str, batch: Any) -> float:
        """Return the loss; 0 where no target counts."""
        self.passes.begin(no_buffers())
        self.passes.begin_pass()
        with self._refused(where, batch):
            output = self.task.forward(self.model.module.train(), batch)
        self.passes.end_pass()
        self._check(where, output, batch)
        with self._refused(where, batch):
            loss = self.task.loss(output, batch)
        if not loss.requires_grad:
            raise ConfigError(
                f"{self._place(where)}: the output does not depend on any trainable parameter; expected logits that gradients "
                "flow from (is the forward pass under no_grad, or its result detached?)"
            )
        with self._refused(where, batch):
            loss.backward()
        self.passes.end_pass()
        self.passes.collect()
        return loss.item() if self.task.count(batch) else 0.0

    def evaluate(
        self, name: str, data: Split, evaluator: Evaluator, params: torch.Tensor, buffers: dict[str, torch.Tensor]
    ) -> None:
        """Evaluate the first batch of a split.

        Raises:
            ConfigError: it cannot be evaluated.
        """
        where = f"the first {name} batch, in eval mode"
        size = min(len(data), self.job.config.train.batch_size)
        batch = self._batch(where, lambda: data.batch(torch.arange(size), None))
        with self._refused(where, batch):
            output = evaluator.output(batch, params, buffers)
        self._check(where, output, batch)
        with self._refused(where, batch), torch.no_grad():
            self.task.sums(output, batch)

    def _batch(self, where: str, make: Callable[[], Any]) -> Any:
        try:
            batch = make()
        except (Exception, SystemExit) as error:  # a user's own data set may raise anything
            raise ConfigError(f"dataset: {self.data_name}: {where} cannot be made: {one_line(error)}") from error
        try:
            self.task.check_batch(batch)
        except ValueError as error:
            raise ConfigError(f"dataset: {self.data_name}: in {where} {error}") from None
        return batch

    def _check(self, where: str, output: object, batch: Any) -> None:
        """Refuse an output that does not fit the targets, and targets that cannot be trained on."""
        try:
            self.task.check(output, batch)
        except UnfitTargets as error:
            raise ConfigError(f"dataset: {self.data_name}, model {self.model_name}: in {where} {error}") from None
        except ValueError as error:
            raise ConfigError(f"{self._place(where)}: {error}{_shown(batch)}") from None

    @contextlib.contextmanager
    def _refused(self, where: str, batch: Any) -> Generator[None]:
        """Refuse what a user's model raises."""
        try:
            yield
        except ModelRefused:
            raise  # it says all itself
        except (Exception, SystemExit) as error:
            raise ConfigError(f"{self._place(where)}: {one_line(error)}{_shown(batch)}") from error

    def _place(self, where: str) -> str:
        return f"model: {self.model_name} on {where} of {self.data_name}"


def _tickets(job: Job) -> list[int]:
    """The tickets to try: the first, and the last of an epoch where its smallest batch is a single sample."""
    last = job.batches_per_epoch - 1
    _, indices = _smallest_batch(job, last)
    return [0, last] if len(indices) == 1 and 0 < last < job.total_tickets else [0]


def _smallest_batch(job: Job, ticket: int) -> tuple[int, torch.Tensor]:
    """The last batch of a ticket: its number in the run, and the numbers of its samples."""
    return job.epochs.batches(ticket, job.config.algorithm.steps)[-1]


def _shown(batch: Any) -> str:
    """Type and shape of a batch's tensors, in parentheses."""
    pair = type(batch) in (tuple, list) and len(batch) == 2
    words = [
        f"{_name(place)} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
        for place, tensor in trees.tensors({"inputs": batch[0], "targets": batch[1]} if pair else batch)
    ]
    return f" ({', '.join(words)})" if words else ""


def _name(place: str) -> str:
    """Write a place in a tree without the brackets and quotes of its first key."""
    return re.sub(r"^\['?(\w+)'?\]", r"\1", place) or "batch"
