"""The dummy worker: it computes nothing, so that a run measures the server and the wire alone."""

from __future__ import annotations

import torch
from typing_extensions import override

from ormo_rpc.messages import Push, Reply
from ormo_rpc.seeding import generator
from ormo_rpc.worker.worker import Worker

SCALE = 1e-6
"""Standard deviation of the pushed values, small enough that parameters stay finite over any number of updates."""


class DummyWorker(Worker):
    """A worker that answers every ticket with the same random vector, drawn once: no batch, no gradient, no loss.

    The arguments are those of `Worker`; those of the gradient are ignored. The vector is as long as the algorithm expects it
    and depends on the seed alone, so all workers push the same one.
    """

    _drawn_into = 0
    """Address of the payload that the vector was drawn into."""
    _drawn: torch.Tensor | None = None
    """Copy of the vector, where error feedback changes the push in place."""

    @override
    def compute(self, reply: Reply) -> Push:
        assert reply.ticket is not None, "a reply without a ticket ends the worker"
        self.warm_up()
        return Push(
            worker=reply.worker,
            ticket=reply.ticket,
            stamp=reply.stamp,
            grad=self._encoder.encode(reply.worker),
            samples=self.epochs.batch_size,
            buffers=self._encoder.buffers.write({}),  # a fault may have written over it
            incarnation=reply.incarnation,
            loss_scale=reply.loss_scale,
        )

    @override
    def load(self, reply: Reply) -> None:
        pass

    @override
    def warm_up(self) -> None:
        # The vector is drawn again when the payload has moved, or when a fault (``corrupt``) has written NaN all over it.
        if self._drawn_into == self.payload.data_ptr() and not self.push[-1].isnan():
            if self._drawn is not None:
                self.push.copy_(self._drawn)
            return
        torch.randn(self.push.shape, generator=generator(self.seed, "stand in", 0), out=self.push)
        self.push.mul_(SCALE)
        self._drawn_into = self.payload.data_ptr()
        form = self._encoder.format
        self._drawn = self.push.clone() if form.compression.error_feedback and not form.exact else None
