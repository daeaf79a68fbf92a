"""One rank's training: its passes, the mean of all ranks' gradients, and the step of torch.optim.SGD."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ormo_rpc.algorithms.groups import Groups
from ormo_rpc.config.runtimes import Shares
from ormo_rpc.errors import ConfigError
from ormo_rpc.models.flat import FlatModel
from ormo_rpc.runtimes.ddp.rounds import Part, Rounds
from ormo_rpc.runtimes.ddp.slowdown import Slowdown
from ormo_rpc.runtimes.job import Job
from ormo_rpc.worker.backward import Backward
from ormo_rpc.worker.forward import compile_forward


@dataclass(frozen=True)
class Computed:
    """The part of this rank in a round, once it is computed.

    Attributes:
        loss: The mean loss of its samples; None where it had none.
        samples: Their number.
    """

    loss: float | None
    samples: int


def together(parts: Sequence[Computed]) -> Computed:
    """Take the parts of several ranks as one, whose loss is the mean over their samples."""
    samples, losses = sum(each.samples for each in parts), [each.loss for each in parts if each.loss is not None]
    if len(losses) > 1:
        losses = [sum(each.loss * each.samples for each in parts if each.loss is not None) / samples]
    return Computed(losses[0] if losses else None, samples)


class Trainer:
    """Trains a model under DistributedDataParallel, in torch's default process group.

    The gradient of a round is the mean over the ranks that have a part in it, each weighted by its `Part.weight`, in the order
    of sums of Gloo's all-reduce. Where every rank has a part and all weigh the same, and none is to be slowed down, it is
    DistributedDataParallel as it comes. Otherwise a hook of it weighs, and sleeps, before each of its buckets is reduced. A
    round in which a rank has no samples is reduced by one all-reduce behind the passes.

    Args:
        job: The run.
        rank: Of this process.
        size: The number of ranks.
        device: That of this rank; by default the CPU.

    Attributes:
        model: The model: parameters by name, and buffers.
    """

    def __init__(self, job: Job, rank: int, size: int, device: torch.device | None = None) -> None:
        config, device = job.config, device or torch.device("cpu")
        options, train = config.ddp, config.train
        self.model = job.model().to(device)
        self.rank = rank
        shared = options.shares is Shares.proportional
        slowdowns = [config.mean_slowdown(each) for each in range(size)] if shared else None
        self.rounds = Rounds(job.epochs, job.total_tickets, size, slowdowns)
        self._lr = job.lr
        self._clip_norm = train.clip_norm
        self._slowdown = Slowdown(config, rank)
        self._weight = 0.0
        module = self.model.module.train()
        if config.worker.compile is not None:
            compile_forward(module, config.worker.compile)
        self._ddp = DistributedDataParallel(
            module, find_unused_parameters=options.find_unused_parameters, gradient_as_bucket_view=True
        )
        if shared or config.heterogeneity.name != "none":
            # A lambda, as torch looks at annotations, which are strings here.
            self._ddp.register_comm_hook(None, lambda _, bucket: self._reduce(bucket))
        of_all: dict[str, Any] = {
            "data": job.training_data(device),
            "task": config.task,
            "seed": config.seed,
            "device": device,
            "channels_last": config.worker.channels_last,
            "accumulate": config.worker.accumulate,
            "autocast": config.worker.autocast.dtype,
        }
        self._backward = Backward(self._ddp, around=self._synchronised, **of_all)
        # Not through DistributedDataParallel's hooks: they would note these parameters as used until it reduces next.
        into = list(self.model.trainable.values()) if options.find_unused_parameters else None
        self._backward_alone = Backward(module, into=into, **of_all)
        self._optimizer = torch.optim.SGD(
            _param_groups(self.model, job.groups()), lr=train.lr, momentum=train.momentum, nesterov=options.nesterov
        )

    def warm_up(self) -> None:
        """Compute a gradient and drop it, since a first pass is many times slower; the buffers are kept as they are."""
        before = self.model.buffers.copy()
        self._backward_alone(self.rounds.part(0, 0).indices, 0)
        self._optimizer.zero_grad()
        self.model.buffers.load(before)

    def round(self, number: int) -> Computed:
        """Compute a round together with all other ranks, and make its step.

        Raises:
            RuntimeError: a rank was lost, or the model cannot be trained so.
            ConfigError: it did not use each of its parameters in the round before.
            ValueError: no target of this rank's samples counts.
        """
        part = self.rounds.part(number, self.rank)
        self._slowdown.begin()
        self._weight = part.weight
        self._optimizer.zero_grad()
        try:
            loss = self._together(part) if part.complete else self._apart(part)
        except RuntimeError as error:
            if "find_unused_parameters" not in str(error):
                raise
            raise ConfigError(
                "model: got parameters that a pass did not use, expected a gradient for each; with runtime=ddp such a model "
                "needs runtime.find_unused_parameters=true"
            ) from error
        if self._clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.trainable.values(), self._clip_norm)
        lr = self._lr(self.rounds.tickets(number)[-1])
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        self._optimizer.step()
        return Computed(loss, len(part.indices))

    def _together(self, part: Part) -> float:
        return _counted(self._backward(part.indices, part.number), part)

    def _apart(self, part: Part) -> float | None:
        """Reduce behind the passes, with a gradient of zero where this rank has no samples."""
        loss = None
        if len(part.indices):
            loss = _counted(self._backward_alone(part.indices, part.number), part)
        self._slowdown.catch_up()
        parameters = list(self.model.trainable.values())
        flat = [torch.zeros_like(p).view(-1) if p.grad is None else p.grad.reshape(-1) for p in parameters]
        used = flat[0].new_tensor([p.grad is not None for p in parameters])
        reduced = torch.cat([*flat, used]).mul_(part.weight)
        dist.all_reduce(reduced)
        *grads, used = reduced.split([*(p.numel() for p in parameters), len(parameters)])
        for parameter, grad, by_any in zip(parameters, grads, used.tolist(), strict=True):
            parameter.grad = grad.view_as(parameter) if by_any else None  # not decayed, as by DistributedDataParallel
        return loss

    def _reduce(self, bucket: Any) -> torch.futures.Future[torch.Tensor]:
        """Weigh this rank's gradients and add up those of all ranks: a communication hook of DistributedDataParallel."""
        self._slowdown.catch_up()
        work: Any = dist.all_reduce(bucket.buffer().mul_(self._weight), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    @contextlib.contextmanager
    def _synchronised(self, last: bool) -> Generator[None]:
        """Reduce gradients in the last pass of a batch alone."""
        with contextlib.nullcontext() if last else self._ddp.no_sync():
            yield


def _counted(loss: float | None, part: Part) -> float:
    """Return the loss of a rank's part of a round.

    Raises:
        ValueError: no target counts.
    """
    if loss is None:
        raise ValueError(
            f"dataset: got ticket {part.number} without a target that counts, expected some in each: with runtime=ddp no rank "
            "can be left out of a round"
        )
    return loss


def _param_groups(model: FlatModel, groups: Groups) -> list[dict[str, Any]]:
    """The parameter groups of torch.optim that stand for ranges of the flat parameters."""
    made: list[dict[str, Any]] = [
        {"params": list[torch.nn.Parameter](), "weight_decay": group.weight_decay, "lr_factor": group.lr_factor}
        for group in groups
    ]
    start = 0
    for parameter in model.trainable.values():
        if parameter.numel():
            number = next(number for number, group in enumerate(groups) if group.start <= start < group.stop)
            made[number]["params"].append(parameter)
        start += parameter.numel()
    return made
