"""The worker: from a `Reply` to a `Push`, the same object in every runtime. It keeps nothing between tickets."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ormo_rpc.data import Epochs, Split
from ormo_rpc.flat import FlatModel
from ormo_rpc.messages import Push, Reply
from ormo_rpc.seeding import generator, seed_for


class Worker:
    """Computes the gradient of a ticket; batch, augmentation and dropout are functions of (seed, ticket) alone.

    The gradient and, behind it, the batch-norm statistics lie in one flat vector, `payload`, which the next call writes over.

    Args:
        model: The model, for this worker alone.
        data: The training split.
        epochs: Which samples make up which ticket.
        seed: The seed of the run.
        weight_decay: ``lambda``; the gradient gets ``+ lambda w_i`` at the parameters that were handed out, after clipping.
        clip_norm: The global norm to which the gradient of the loss is clipped first; None for no clipping.
    """

    def __init__(
        self,
        model: FlatModel,
        data: Split,
        epochs: Epochs,
        *,
        seed: int,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
    ) -> None:
        self.model = model
        self.data = data
        self.epochs = epochs
        self.seed = seed
        self.weight_decay = weight_decay
        self.clip_norm = clip_norm
        model.module.train()
        self.payload = torch.zeros(model.params.size + model.buffers.size, dtype=model.dtype)
        self.grad, statistics = self.payload.split([model.params.size, model.buffers.size])
        model.bind_grad(self.grad)
        self.buffers = model.bind_batch_statistics(statistics)

    def compute(self, reply: Reply) -> Push:
        """The push that answers a reply. Its tensors are views of `payload`: use them before the next call.

        Args:
            reply: Work, that is, a ticket that is not None.
        """
        assert reply.ticket is not None, "a reply without a ticket is the word to stop"
        self.model.bind(reply.params)
        self.payload.zero_()
        loss, samples = self._backward(reply.ticket)
        self._regularise(reply.params)
        return Push(
            worker=reply.worker,
            ticket=reply.ticket,
            stamp=reply.stamp,
            grad=self.grad,
            loss=loss,
            samples=samples,
            buffers=self.buffers,
            incarnation=reply.incarnation,
        )

    def warm_up(self) -> None:
        """Compute a gradient and forget it: a first pass is many times slower, a delay that means nothing."""
        self.model.bind(self.model.flat_params())
        self._backward(0)

    def _backward(self, ticket: int) -> tuple[float, int]:
        """Add the gradient of the ticket's mean loss into `grad`; return that loss and the number of samples."""
        augmentation = generator(self.seed, "augment", ticket)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_for(self.seed, "forward", ticket))
            inputs, targets = self.data.batch(self.epochs.indices(ticket), augmentation)
            loss = functional.cross_entropy(self.model.module(inputs), targets)
            loss.backward()
        return loss.item(), len(targets)

    def _regularise(self, params: Tensor) -> None:
        """Clip, then decay: torch's order."""
        if self.clip_norm is not None:
            norm = self.grad.norm().item()
            if norm > self.clip_norm:
                self.grad.mul_(self.clip_norm / norm)
        if self.weight_decay:
            self.grad.add_(params, alpha=self.weight_decay)
