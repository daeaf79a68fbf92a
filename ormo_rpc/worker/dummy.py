"""A worker that computes nothing, so that a run measures the server and the wire alone, on any cluster."""

from __future__ import annotations

import torch
from torch import Tensor

from ormo_rpc.messages import Push, Reply
from ormo_rpc.seeding import generator
from ormo_rpc.worker.worker import Worker

SCALE = 1e-6
"""The standard deviation of what is pushed: so small that the parameters stay finite over any number of updates."""


class DummyWorker(Worker):
    """Answers every ticket with the same vector, which is drawn once, in no time: no pass over it, no batch, no loss.

    The arguments are those of `Worker`; what concerns the gradient is not read. Whatever the algorithm expects, one vector or
    several, a gradient or a difference of parameters, it gets small numbers, those of the seed and so those of every worker.
    """

    _drawn_into = 0
    """Where the payload lay when it was drawn."""
    _drawn: Tensor | None = None
    """What was drawn, where the errors of the wire are added to the push itself."""

    def compute(self, reply: Reply) -> Push:
        """The push that answers a reply; it has no loss, as nothing was looked at."""
        assert reply.ticket is not None, "a reply without a ticket is the word to stop"
        self.warm_up()
        return Push(
            worker=reply.worker,
            ticket=reply.ticket,
            stamp=reply.stamp,
            grad=self._encoder.encode(reply.worker),
            samples=self.epochs.batch_size,
            buffers=self.buffers,
            incarnation=reply.incarnation,
        )

    def load(self, reply: Reply) -> None:
        """There is nothing to load."""

    def warm_up(self) -> None:
        """Draw what is pushed, unless it lies in the payload already, where a lossy wire does not change it.

        A fault (``corrupt``) writes NaN over all of the payload, so that the last value tells of it.
        """
        last = (self.statistics if self.statistics.numel() else self.push)[-1]
        if self._drawn_into == self.payload.data_ptr() and not last.isnan():
            if self._drawn is not None:
                self.push.copy_(self._drawn)
            return
        torch.randn(self.push.shape, generator=generator(self.seed, "stand in", 0), out=self.push)
        self.push.mul_(SCALE)
        self.statistics.fill_(1.0)  # a mean and a variance that an evaluation could live with
        self._drawn_into = self.payload.data_ptr()
        form = self._encoder.format
        self._drawn = self.push.clone() if form.compression.error_feedback and not form.exact else None
