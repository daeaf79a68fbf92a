"""The worker: from a `Reply` to a `Push`, the same object in every runtime.

It keeps no state between tickets, but for the compression state of a lossy wire format (see `Encoder`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import ClassVar

import torch
from typing_extensions import override

from ormo_rpc.algorithms.base import Algorithm, LocalWork
from ormo_rpc.algorithms.groups import Groups
from ormo_rpc.compression import Allocate, PushFormat
from ormo_rpc.data import Epochs, Split
from ormo_rpc.messages import Push, Reply, no_buffers, weighted_mean_loss
from ormo_rpc.models.flat import FlatModel
from ormo_rpc.tasks import Classification, Task
from ormo_rpc.worker.backward import Backward
from ormo_rpc.worker.base import BaseWorker
from ormo_rpc.worker.forward import compile_forward

Gradient = Callable[["torch.Tensor", "torch.Tensor", int, "torch.Tensor"], float | None]
"""``gradient(params, indices, number, into)``: see `Worker._gradient`."""


class Worker(BaseWorker):
    """Computes the push of a ticket; batches, augmentation and dropout are functions of (seed, ticket) alone.

    `BaseWorker` has what it shares with loops of the user's own, `payload` among it.

    Args:
        model: The model, for this worker alone.
        data: The training split.
        epochs: The samples of each ticket.
        algorithm: The server's algorithm, which makes the push of the gradients (`Algorithm.local`).
        seed: The seed of the run.
        momentum: ``beta``, for algorithms with local steps.
        groups: Weight decay and learning-rate factor of each range of the parameters; see `BaseWorker`.
        clip_norm: The global norm to which the gradient of the loss is clipped first; None for no clipping.
        task: The loss; by default that of classification.
        accumulate: The number of parts in which each batch goes through the model; see `micro_batches`.
        channels_last: Lay out images with their channels last.
        autocast: The dtype of passes under ``torch.autocast``; None for none.
        compile: The backend of ``torch.compile`` that compiles the passes; None for none.
        wire_format: The wire form of pushes; exact by default.
        allocate: Allocates the memory of `payload`, given its number of bytes.
    """

    AHEAD: ClassVar[int] = 0
    """The number of tickets that it can begin before they are asked for."""

    def __init__(
        self,
        model: FlatModel,
        data: Split,
        epochs: Epochs,
        algorithm: Algorithm,
        *,
        seed: int,
        momentum: float = 0.0,
        groups: Groups = (),
        clip_norm: float | None = None,
        task: Task | None = None,
        channels_last: bool = False,
        accumulate: int = 1,
        autocast: torch.dtype | None = None,
        compile: str | None = None,  # noqa: A002 - the word for it
        wire_format: PushFormat | None = None,
        allocate: Allocate | None = None,
    ) -> None:
        super().__init__(model, algorithm, groups=groups, clip_norm=clip_norm, wire_format=wire_format, allocate=allocate)
        self.data = data
        self.epochs = epochs
        self.seed = seed
        self.momentum = momentum
        self._backward = Backward(
            model.module,
            data,
            task or Classification(),
            seed=seed,
            device=model.device,
            channels_last=channels_last,
            accumulate=accumulate,
            autocast=autocast,
            scaled=self.scaled,
            around=self._around_part if accumulate > 1 else None,
        )
        if compile is not None:
            compile_forward(model.module, compile)

    def begin(self, *replies: Reply) -> None:
        """Start to compute pushes without waiting for them, in the order in which they will be asked for.

        It changes no later result. A worker whose `AHEAD` is 0 computes them when they are asked for.
        """

    def compute(self, reply: Reply) -> Push:
        """Compute the push for a reply, as the server will decode it; `payload` is its wire form.

        Both are overwritten by the next call. With a lossy format call it once for each ticket, since the part that this push
        drops is added to the next one of the same worker.

        Args:
            reply: A reply with a ticket.
        """
        self._passes.begin(reply.buffers)
        self.loss_scale = reply.loss_scale
        loss, samples = self._local(reply, self._gradient, self.push)
        return self._made(reply, loss=loss, samples=samples)

    def _local(self, reply: Reply, gradient: Gradient, push: torch.Tensor) -> tuple[float | None, int]:
        """Write the push for a reply into ``push``, not encoded; return the mean loss and the number of samples.

        Args:
            reply: A reply with a ticket.
            gradient: `_gradient`, or what takes its place.
            push: On the model's device, shape (VECTORS_PUSHED * D,).
        """
        assert reply.ticket is not None, "a reply without a ticket ends the worker"
        batches, losses = self.epochs.batches(reply.ticket, reply.steps), list[tuple[float | None, int]]()

        def step_gradient(params: torch.Tensor, step: int, into: torch.Tensor) -> None:
            number, indices = batches[step]
            losses.append((gradient(params, indices, number, into), len(indices)))

        work = LocalWork(
            sent=self._cast(reply.params),
            dimension=self.model.params.size,
            lr=reply.lr,
            momentum=self.momentum,
            steps=len(batches),
            gradient=step_gradient,
        )
        self.algorithm.local(work, push)
        return weighted_mean_loss(losses), sum(len(indices) for _, indices in batches)

    def load(self, reply: Reply) -> None:
        """Make the batches of a ticket now, for `compute`, where they depend on nothing but their numbers.

        It may run while another worker of this process computes.
        """
        if reply.ticket is not None:
            self._backward.load(self.epochs.batches(reply.ticket, reply.steps))

    @override
    def warm_up(self) -> None:
        self._first_pass()  # it is many times slower, and would be measured as a delay

    def _first_pass(self) -> dict[str, torch.Tensor]:
        """Compute the gradient of the first batch at the initial parameters; return the buffers that it reports."""
        self._passes.begin(no_buffers())
        scratch = torch.zeros(self.model.params.size, dtype=self.model.dtype, device=self.model.device)
        self._gradient(self.model.flat_params(), self.epochs.indices(0), 0, scratch)
        return self._passes.collect()

    def _gradient(self, params: torch.Tensor, indices: torch.Tensor, number: int, into: torch.Tensor) -> float | None:
        """Write the gradient of the targets' mean loss at ``params`` into ``into``; return that loss, None where none counts.

        ``number`` is that of the batch in the run, and seeds its random draws.
        """
        self._begin_gradient(params, into)
        value = self._backward(indices, number)
        if value is None:
            for parameter in self.model.trainable.values():
                parameter.grad = None  # the gradient of a mean of nothing may be NaN
        self._end_gradient(params, into)
        return value

    @contextlib.contextmanager
    def _around_part(self, _: bool) -> Generator[None]:
        yield
        self.model.collect_grad()  # gradients of 16 bits add up in the vector's dtype
