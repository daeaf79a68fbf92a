"""The worker: from a `Reply` to a `Push`, the same object in every runtime.

It keeps no state between tickets, but for the compression state of a lossy wire format (see `Encoder`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ormo_rpc.algorithms.base import Algorithm, LocalWork
from ormo_rpc.compression import Allocate, Encoder, PushFormat
from ormo_rpc.data import Epochs, Split
from ormo_rpc.messages import Push, Reply, no_buffers
from ormo_rpc.models.flat import FlatModel
from ormo_rpc.models.passes import Passes
from ormo_rpc.seeding import generator, seeded
from ormo_rpc.worker.objective import count, mean_loss


class Worker:
    """Computes the push of a ticket; batches, augmentation and dropout are functions of (seed, ticket) alone.

    The push and, behind it, the buffers that its passes have changed lie in one flat tensor, `payload`, which the next call
    writes over: of the model's dtype where the wire format is exact, else the bytes of the wire form. `wire` is the same memory
    as bytes.

    Args:
        model: The model, for this worker alone.
        data: The training split.
        epochs: The samples of each ticket.
        algorithm: The server's algorithm, which makes the push of the gradients (`Algorithm.local`).
        seed: The seed of the run.
        momentum: ``beta``, for algorithms with local steps.
        weight_decay: ``lambda``; a gradient gets ``+ lambda w`` at the parameters where it is taken, after clipping.
        clip_norm: The global norm to which the gradient of the loss is clipped first; None for no clipping.
        wire_format: The wire form of pushes; exact by default.
        allocate: Allocates the memory of `payload`, given its number of bytes.
    """

    def __init__(
        self,
        model: FlatModel,
        data: Split,
        epochs: Epochs,
        algorithm: Algorithm,
        *,
        seed: int,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
        wire_format: PushFormat | None = None,
        allocate: Allocate | None = None,
    ) -> None:
        self.model = model
        self.data = data
        self.epochs = epochs
        self.algorithm = algorithm
        self.seed = seed
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.clip_norm = clip_norm
        exact = PushFormat(
            params=model.params, buffers=model.buffers.layout, dtype=model.dtype, vectors=algorithm.VECTORS_PUSHED
        )
        self._encoder = Encoder(wire_format or exact, allocate)
        self.wire, self.payload = self._encoder.wire, self._encoder.payload
        self.push = self._encoder.push
        self._passes = Passes(model)
        self._grad_bound = 0
        self._loaded: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """Batches made ahead by `load`, by their numbers in the run."""
        self._sent = torch.empty(0, dtype=model.dtype)
        """The sent parameters, where they had to be cast to the model's dtype."""

    def compute(self, reply: Reply) -> Push:
        """Compute the push for a reply, as the server will decode it; `payload` is its wire form.

        Both are overwritten by the next call. With a lossy format call it once for each ticket, since the part that this push
        drops is added to the next one of the same worker.

        Args:
            reply: A reply with a ticket.
        """
        assert reply.ticket is not None, "a reply without a ticket ends the worker"
        batches, losses = self.epochs.batches(reply.ticket, reply.steps), list[float]()
        self._passes.begin(reply.buffers)

        def gradient(params: torch.Tensor, step: int, into: torch.Tensor) -> None:
            number, indices = batches[step]
            loss = self._gradient(params, indices, number, into)
            if loss is not None:
                losses.append(loss)

        work = LocalWork(
            sent=self._cast(reply.params),
            dimension=self.model.params.size,
            lr=reply.lr,
            momentum=self.momentum,
            steps=len(batches),
            gradient=gradient,
        )
        self.algorithm.local(work, self.push)
        return Push(
            worker=reply.worker,
            ticket=reply.ticket,
            stamp=reply.stamp,
            grad=self._encoder.encode(reply.worker),
            loss=sum(losses) / len(losses) if losses else None,
            samples=sum(len(indices) for _, indices in batches),
            buffers=self._encoder.buffers.write(self._passes.collect()),
            incarnation=reply.incarnation,
        )

    def load(self, reply: Reply) -> None:
        """Make the batches of a ticket now, for `compute`, where they depend on nothing but their numbers.

        It may run while another worker of this process computes.
        """
        if reply.ticket is not None and self.data.PURE:
            batches = self.epochs.batches(reply.ticket, reply.steps)
            self._loaded = {number: self.data.batch(indices, self._augmentation(number)) for number, indices in batches}

    def forget(self, worker: int | None = None) -> None:
        """Reset the compression state of a worker, or of all workers, as when it joins again."""
        self._encoder.reset(worker)

    def state_dict(self) -> dict[int, dict[str, Any]]:
        """Return the compression state of each worker, copied; empty where nothing is compressed or fed back."""
        return self._encoder.state_dict()

    def load_state_dict(self, state: Mapping[int, Mapping[str, Any]]) -> None:
        """Restore what `state_dict` returned."""
        self._encoder.load_state_dict(state)

    def _cast(self, sent: torch.Tensor) -> torch.Tensor:
        """Cast the sent parameters to the model's dtype."""
        if sent.dtype == self.model.dtype:
            return sent
        if self._sent.shape != sent.shape:
            self._sent = torch.empty_like(sent, dtype=self.model.dtype)
        return self._sent.copy_(sent)

    def warm_up(self) -> None:
        """Compute a gradient and drop it, since a first pass is many times slower and would be measured as a delay."""
        self._passes.begin(no_buffers())
        scratch = torch.zeros(self.model.params.size, dtype=self.model.dtype)
        self._gradient(self.model.flat_params(), self.epochs.indices(0), 0, scratch)
        self._passes.collect()

    def _gradient(self, params: torch.Tensor, indices: torch.Tensor, number: int, into: torch.Tensor) -> float | None:
        """Write the gradient of the targets' mean loss at ``params`` into ``into``; return that loss, None where none counts.

        ``number`` is that of the batch in the run, and seeds its random draws.
        """
        self.model.bind(params)
        if into.data_ptr() != self._grad_bound:
            self.model.bind_grad(into)
            self._grad_bound = into.data_ptr()
        into.zero_()
        self._passes.begin_pass()
        with seeded(self.seed, "forward", number):
            inputs, targets = self._loaded.pop(number, None) or self.data.batch(indices, self._augmentation(number))
            loss = mean_loss(self.model.module(inputs), targets)
            loss.backward()
        self.model.collect_grad()
        self._passes.end_pass()
        self._regularise(into, params)
        value = loss.item()
        return None if math.isnan(value) and count(targets) == 0 else value

    def _augmentation(self, number: int) -> torch.Generator:
        return generator(self.seed, "augment", number)

    def _regularise(self, grad: torch.Tensor, params: torch.Tensor) -> None:
        """Clip, then decay: torch's order."""
        if self.clip_norm is not None:
            norm = grad.norm().item()
            if norm > self.clip_norm:
                grad.mul_(self.clip_norm / norm)
        if self.weight_decay:
            grad.add_(params, alpha=self.weight_decay)
