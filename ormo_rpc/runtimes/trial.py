"""One trial batch in the launcher, so that a model that cannot be trained on its data is refused before anything starts."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import math
import re
import warnings
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch

from ormo_rpc import devices
from ormo_rpc.data import Split, trees
from ormo_rpc.data.trees import to_device
from ormo_rpc.errors import ConfigError, ModelRefused, one_line
from ormo_rpc.messages import no_buffers
from ormo_rpc.models.flat import FlatModel
from ormo_rpc.models.pass_checks import check_passes, warn_of_views
from ormo_rpc.models.passes import Passes
from ormo_rpc.runtimes.configured import DEVICE
from ormo_rpc.runtimes.job import Job
from ormo_rpc.seeding import generator, seeded
from ormo_rpc.tasks import Sums, UnfitTargets
from ormo_rpc.worker.accumulation import micro_batches
from ormo_rpc.worker.evaluation import Evaluator
from ormo_rpc.worker.forward import autocast, compiled, compiler_failure

PARTS_TOLERANCE = 1e-3
"""The difference, relative and absolute, from which the loss of a batch is not that of its parts; at 16 bits it is larger."""
_log = logging.getLogger(__name__)


def try_job(job: Job) -> None:
    """Train and evaluate one batch with a model that is thrown away; random states are left as they were.

    An epoch that ends with a batch of a single sample has that one tried as well, since batch norms refuse it.

    Raises:
        ConfigError: a batch cannot be made, the model cannot be trained or evaluated on it, its output does not fit, or a pass
            that is to be recorded as a graph cannot be.
    """
    accumulate, size = job.config.worker.accumulate, job.config.train.batch_size
    if accumulate > size:
        raise ConfigError(f"worker.accumulate: got {accumulate}, expected at most train.batch_size={size}: a part has a sample")
    with seeded(job.config.seed, "trial", 0), torch.enable_grad():
        device = devices.use(devices.resolve_if_there(job.config.worker.device, key=DEVICE))
        model = job.model().to(device)
        initial = model.flat_params(), model.buffers.copy()
        former = [parameter.detach() for parameter in model.trainable.values()]
        model.bind(initial[0])
        trial = Trial(job, model)
        with compiled(model.module, job.config.worker.compile):
            for ticket in _tickets(job):
                trial.train(*_smallest_batch(job, ticket))
        warn_of_views(model.module, former)
        if job.config.worker.cuda_graph and device.type == "cuda":
            job.worker(device=device).warm_up()
        evaluator = Evaluator(model, job.data, job.config.task, autocast=trial.dtype)
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
        self.accumulate = job.config.worker.accumulate
        self.dtype = job.config.worker.autocast.dtype
        self.autocast = functools.partial(autocast, self.dtype, model.device.type)
        try:
            self.stateful = self.task.stateful_metrics()
        except ValueError as error:
            raise ConfigError(str(error)) from None
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
        if self.accumulate > 1:
            self._check_parts(where, number, batch)
        if not math.isfinite(losses[0]):
            _log.warning("%s: the loss is %s at the initial weights", self._place(where), losses[0])

    def _train(self, where: str, batch: Any) -> float:
        """Return the loss; 0 where no target counts."""
        self.passes.begin(no_buffers())
        if self.accumulate == 1:
            loss, counted = self._train_part(where, batch), self._count(where, batch)
            value = loss if counted else 0.0
        else:
            of_part = f"a part of {where}, as worker.accumulate={self.accumulate},"
            value = sum(self._train_part(of_part, part) * weight for part, weight in self._parts(where, batch))
        self.passes.collect()
        return value

    def _train_part(self, where: str, batch: Any) -> float:
        """Compute the gradient of a batch, or of a part of it; return the loss."""
        self.passes.begin_pass()
        with self._refused(where, batch), self.autocast():
            output = self.task.forward(self.model.module.train(), batch)
        self.passes.end_pass()
        self._check(where, output, batch)
        with self._refused(where, batch, of_task=True), self.autocast():
            loss: Any = self.task.loss(output, batch)
        self._check_loss(where, loss)
        with self._refused(where, batch):
            loss.backward()
        self.passes.end_pass()
        return loss.item()

    def _parts(self, where: str, batch: Any) -> list[tuple[Any, float]]:
        """Cut a batch as a worker that accumulates does."""
        try:
            return [(part, weight) for _, part, weight in micro_batches(self.task, batch, self.accumulate)]
        except (Exception, SystemExit) as error:  # a task of the user's own counts
            reason = str(error) if type(error) is ValueError else one_line(error)
            raise ConfigError(
                f"worker.accumulate: got {self.accumulate}, expected 1, as {where} of {self.data_name} cannot be cut: {reason}"
            ) from error

    def _check_parts(self, where: str, number: int, batch: Any) -> None:
        """Refuse to accumulate where the losses of the parts do not make up that of the batch.

        Compared in eval mode, since batch norms and dropout have their own draws and statistics in each part; not at all where
        the loss depends on draws in that mode, too.
        """
        self.model.module.eval()
        with torch.no_grad(), self._refused(where, batch):
            whole, again = (self._loss(batch, number + shift) for shift in (0, 1))
            parts = sum(self._loss(part, number) * weight for part, weight in self._parts(where, batch))
        tolerance = max(PARTS_TOLERANCE, 4 * max(torch.finfo(each.dtype).eps for each in self.model.trainable.values()))
        if whole == again and not math.isclose(whole, parts, rel_tol=tolerance, abs_tol=tolerance):
            raise ConfigError(
                f"worker.accumulate: got {self.accumulate}, expected 1: the loss of {where} of {self.data_name} is {whole:g}, "
                f"and that of its parts {parts:g}; it is no mean over targets that each belong to one sample"
            )

    def _loss(self, batch: Any, number: int) -> float:
        with seeded(self.job.config.seed, "forward", number), self.autocast():
            return self.task.loss(self.task.forward(self.model.module, batch), batch).item()

    def _count(self, where: str, batch: Any) -> float:
        with self._refused(where, batch, of_task=True):
            counted = float(self.task.count(batch))
            if not 0 <= counted < math.inf:
                raise ValueError(f"count: got {counted:g} targets that count, expected a finite number >= 0")
            return counted

    def _check_loss(self, where: str, loss: object) -> None:
        """Refuse what is no loss, or has no gradient."""
        place = self._place(where, of_task=True)
        if not isinstance(loss, torch.Tensor):
            raise ConfigError(f"{place}: the loss is of type {type(loss).__name__}, expected a tensor of no dimension")
        if loss.dim() or not loss.is_floating_point():
            got = f"has the shape {tuple(loss.shape)}" if loss.dim() else f"is of {loss.dtype}"
            raise ConfigError(f"{place}: the loss {got}, expected one number of floating point: the mean over the targets")
        if not loss.requires_grad:
            raise ConfigError(
                f"{self._place(where)}: the loss does not depend on any trainable parameter; expected one that gradients flow "
                "from (is the forward pass under no_grad, or its output detached?)"
            )

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
        with self._refused(where, batch, of_task=True), torch.no_grad(), self.autocast():
            sums: Any = self.task.sums(output, batch)
            if not isinstance(sums, Mapping) or not all(isinstance(each, Sums) for each in sums.values()) or "loss" not in sums:
                raise ValueError("sums() must return Sums by name, one of them named loss")
            self.task.means(sums)
        if self.stateful:
            self._score(where, output, batch)

    def _score(self, where: str, output: Any, batch: Any) -> None:
        """Try the metrics of torchmetrics on a batch."""
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # of how few samples there are
                self.stateful.begin()
                self.stateful.update(*self.task.scored(output, batch))
                self.stateful.compute()
        except ValueError as error:
            raise ConfigError(f"{error} (on {where} of {self.data_name})") from None

    def _batch(self, where: str, make: Callable[[], Any]) -> Any:
        try:
            batch = make()
        except (Exception, SystemExit) as error:  # a user's own data set may raise anything
            raise ConfigError(f"dataset: {self.data_name}: {where} cannot be made: {one_line(error)}") from error
        try:
            self.task.check_batch(batch)
        except ValueError as error:
            raise ConfigError(f"dataset: {self.data_name}: in {where} {error}") from None
        return to_device(batch, self.model.device)

    def _check(self, where: str, output: object, batch: Any) -> None:
        """Refuse an output that does not fit the targets, and targets that cannot be trained on."""
        try:
            self.task.check(output, batch)
        except UnfitTargets as error:
            raise ConfigError(f"dataset: {self.data_name}, model {self.model_name}: in {where} {error}") from None
        except ValueError as error:
            raise ConfigError(f"{self._place(where)}: {error}{_shown(batch)}") from None

    @contextlib.contextmanager
    def _refused(self, where: str, batch: Any, *, of_task: bool = False) -> Generator[None]:
        """Refuse what a user's model, or task, raises."""
        try:
            yield
        except ModelRefused:
            raise  # it says all itself
        except (Exception, SystemExit) as error:
            failure = compiler_failure(error, self.job.config.worker.compile) or one_line(error)
            raise ConfigError(f"{self._place(where, of_task=of_task)}: {failure}{_shown(batch)}") from error

    def _place(self, where: str, *, of_task: bool = False) -> str:
        culprit = f"task: {self.task.known_as}" if of_task else f"model: {self.model_name}"
        return f"{culprit} on {where} of {self.data_name}"


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
