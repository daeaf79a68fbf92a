"""The samples of each ticket."""

from __future__ import annotations

import functools

import torch
from typing_extensions import override

from ormo_rpc.seeding import generator


class Epochs:
    """The sequence of batches that tickets 0, 1, 2, ... stand for: epoch after epoch, each in an order of its own.

    Every epoch covers every sample exactly once, unless they are weighted; its last batch is smaller where the batch size does
    not divide. The batch of a ticket is a function of ``(seed, ticket)``: it depends neither on the worker nor on earlier
    tickets.

    Args:
        num_samples: N, the size of the training set.
        batch_size: Samples per ticket.
        seed: The seed of the run.
        weights: Draw the N samples of each epoch with replacement, in proportion to these, shape (N,).
        in_order: Shuffle nothing: sample p of epoch e has the number ``e N + p``.

    Raises:
        ValueError: when there is no sample, or the batch size is not above 0.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        *,
        weights: torch.Tensor | None = None,
        in_order: bool = False,
    ) -> None:
        if num_samples < 1:
            raise ValueError("dataset: the training set is empty, expected at least one sample")
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, expected a whole number >= 1")
        self.batch_size = batch_size
        self.batches_per_epoch = -(-num_samples // batch_size)
        order = _numbers if in_order else _permutation
        draw = functools.partial(order, num_samples, seed) if weights is None else functools.partial(_sample, weights, seed)
        # At the boundary of two epochs tickets of both are in flight, hence two orders.
        self._order = functools.lru_cache(maxsize=2)(draw)

    def total_tickets(self, epochs: int) -> int:
        """The number of tickets in that many epochs."""
        return epochs * self.batches_per_epoch

    def indices(self, ticket: int) -> torch.Tensor:
        """The sample numbers of a ticket, int64, shape (B,)."""
        epoch, number = divmod(ticket, self.batches_per_epoch)
        return self._order(epoch)[number * self.batch_size : (number + 1) * self.batch_size]

    def batches(self, ticket: int, steps: int) -> list[tuple[int, torch.Tensor]]:
        """The batches of a ticket of that many local steps: the number of each in the run, and its sample numbers."""
        indices = self.indices(ticket)
        parts = indices.tensor_split(min(steps, len(indices)))  # the last ticket of an epoch may be a small one
        return [(ticket * steps + step, part) for step, part in enumerate(parts)]


class TicketParts(Epochs):
    """The batches of the tickets in which a region divides those of the server: part p of ticket t has the number t n + p.

    Args:
        whole: The tickets of the server.
        parts: n.
    """

    def __init__(self, whole: Epochs, parts: int) -> None:
        self.whole = whole
        self.parts = parts
        self.batch_size = whole.batch_size // parts
        self.batches_per_epoch = whole.batches_per_epoch * parts

    @override
    def indices(self, ticket: int) -> torch.Tensor:
        return torch.cat([samples for _, samples in self.batches(ticket, 1)])

    @override
    def batches(self, ticket: int, steps: int) -> list[tuple[int, torch.Tensor]]:
        number, part = divmod(ticket, self.parts)
        return self.whole.batches(number, self.parts * steps)[part * steps : (part + 1) * steps]

    def count(self, number: int, steps: int) -> int:
        """Return the parts of a ticket of the server that have any batch; the last one of an epoch may have few."""
        return -(-len(self.whole.batches(number, self.parts * steps)) // steps)


def _permutation(num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    """The order of one epoch, shape (N,)."""
    return torch.randperm(num_samples, generator=generator(seed, "order", epoch))


def _numbers(num_samples: int, _seed: int, epoch: int) -> torch.Tensor:
    """The numbers of the samples of one epoch that is read in order, shape (N,)."""
    return torch.arange(epoch * num_samples, (epoch + 1) * num_samples)


def _sample(weights: torch.Tensor, seed: int, epoch: int) -> torch.Tensor:
    """The samples of one epoch in the order in which they were drawn, shape (N,), as ``WeightedRandomSampler`` draws them."""
    return torch.multinomial(weights, len(weights), replacement=True, generator=generator(seed, "order", epoch))
