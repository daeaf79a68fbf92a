"""The worker: from a `Reply` to a `Push`, the same object in every runtime. It keeps nothing between tickets."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ormo_rpc.algorithms.base import Algorithm, LocalWork
from ormo_rpc.data import Epochs, Split
from ormo_rpc.flat import FlatModel
from ormo_rpc.messages import Push, Reply
from ormo_rpc.seeding import generator, seed_for


def plain_bytes(size: int) -> Tensor:
    """That many bytes of this process alone, zero."""
    return torch.zeros(size, dtype=torch.uint8)


class Worker:
    """Computes the push of a ticket; batches, augmentation and dropout are functions of (seed, ticket) alone.

    The push and, behind it, the batch-norm statistics lie in one flat vector, `payload`, which the next call writes over.

    Args:
        model: The model, for this worker alone.
        data: The training split.
        epochs: Which samples make up which ticket.
        rule: The server's rule, which says what becomes of the gradients before they are pushed.
        seed: The seed of the run.
        momentum: ``beta``, for rules with local steps.
        weight_decay: ``lambda``; a gradient gets ``+ lambda w`` at the parameters where it is taken, after clipping.
        clip_norm: The global norm to which the gradient of the loss is clipped first; None for no clipping.
        allocate: Makes the memory of `payload`: that many bytes, zero, as a tensor of uint8.
    """

    def __init__(
        self,
        model: FlatModel,
        data: Split,
        epochs: Epochs,
        rule: type[Algorithm],
        *,
        seed: int,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
        allocate: Callable[[int], Tensor] = plain_bytes,
    ) -> None:
        self.model = model
        self.data = data
        self.epochs = epochs
        self.rule = rule
        self.seed = seed
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.clip_norm = clip_norm
        model.module.train()
        length = rule.VECTORS_PUSHED * model.params.size
        self.payload = allocate((length + model.buffers.size) * model.dtype.itemsize).view(model.dtype)
        self.push, self.statistics = self.payload.split([length, model.buffers.size])
        self.buffers = model.bind_batch_statistics(self.statistics)
        self._grad_bound = 0

    def compute(self, reply: Reply) -> Push:
        """The push that answers a reply. Its tensors are views of `payload`: use them before the next call.

        Args:
            reply: Work, that is, a ticket that is not None.
        """
        assert reply.ticket is not None, "a reply without a ticket is the word to stop"
        ticket, losses = reply.ticket, list[float]()
        indices = self.epochs.indices(ticket)
        batches = indices.tensor_split(min(reply.steps, len(indices)))  # the last ticket of an epoch may be a small one

        def gradient(params: Tensor, step: int, into: Tensor) -> None:
            losses.append(self._gradient(params, batches[step], ticket * reply.steps + step, into))

        work = LocalWork(
            sent=reply.params,
            dimension=self.model.params.size,
            lr=reply.lr,
            momentum=self.momentum,
            steps=len(batches),
            gradient=gradient,
        )
        self.rule.local(work, self.push)
        return Push(
            worker=reply.worker,
            ticket=ticket,
            stamp=reply.stamp,
            grad=self.push,
            loss=sum(losses) / len(losses),
            samples=len(indices),
            buffers=self.buffers,
            incarnation=reply.incarnation,
        )

    def warm_up(self) -> None:
        """Compute a gradient and forget it: a first pass is many times slower, a delay that means nothing."""
        scratch = torch.zeros(self.model.params.size, dtype=self.model.dtype)
        self._gradient(self.model.flat_params(), self.epochs.indices(0), 0, scratch)

    def _gradient(self, params: Tensor, indices: Tensor, number: int, into: Tensor) -> float:
        """Write the gradient of the samples' mean loss at ``params`` into ``into``; return that loss.

        ``number`` is that of the batch in the run, the seed of all that is random in it.
        """
        self.model.bind(params)
        if into.data_ptr() != self._grad_bound:
            self.model.bind_grad(into)
            self._grad_bound = into.data_ptr()
        into.zero_()
        self.statistics.zero_()
        augmentation = generator(self.seed, "augment", number)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_for(self.seed, "forward", number))
            inputs, targets = self.data.batch(indices, augmentation)
            loss = functional.cross_entropy(self.model.module(inputs), targets)
            loss.backward()
        self._regularise(into, params)
        return loss.item()

    def _regularise(self, grad: Tensor, params: Tensor) -> None:
        """Clip, then decay: torch's order."""
        if self.clip_norm is not None:
            norm = grad.norm().item()
            if norm > self.clip_norm:
                grad.mul_(self.clip_norm / norm)
        if self.weight_decay:
            grad.add_(params, alpha=self.weight_decay)
