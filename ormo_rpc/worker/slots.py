"""A ticket on its way through a device: what was begun and not taken yet."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import torch

from ormo_rpc.compression.wire_buffers import WireBuffers
from ormo_rpc.messages import Reply, weighted_mean_loss
from ormo_rpc.worker.recording import RecordingStream
from ormo_rpc.worker.static_model import StaticModel


class Slot:
    """Memory for the results of one ticket, and for what its work reads of the host's.

    Args:
        stream: Its work is put there.
        static: The model of the work.
        push: The number of values in a push.

    Attributes:
        reply: What is computed; None where nothing is, or it was taken.
        push: The push, not encoded, shape (VECTORS_PUSHED * D,).
        region: The buffers that are reported, as `StaticModel.reported` has them; means over the passes.
        buffers: The same, by name.
        samples: The number of samples of the ticket.
        sizes: The number of samples of each pass.
        begun: The number of the ticket among those of the worker that were begun.
        batches: The batches that were made for it elsewhere than on the device, by their numbers in the run.
    """

    def __init__(self, stream: RecordingStream, static: StaticModel, push: int) -> None:
        device = stream.device
        self.reply: Reply | None = None
        self.push = torch.zeros(push, dtype=static.params.dtype, device=device)
        self.region = torch.zeros_like(static.reported)
        self.buffers = WireBuffers(static.model.buffers.layout, self.region).views(static.names)
        self.samples = 0
        self.sizes: list[int] = []
        self.begun = 0
        self.batches: dict[int, Any] = {}
        self._static = static
        self._averages = static.statistics(self.region)
        self._of_pass = static.statistics(static.reported)
        self._counts = static.counts(self.region)
        self._passes = 0
        self._pinned = device.type == "cuda"
        self._losses = self._host(1, torch.float64)
        self._staged: dict[Hashable, torch.Tensor] = {}
        self._event = stream.event()

    def take(self, reply: Reply, begun: int) -> None:
        """Begin the work for a reply; what was begun here before is dropped, once nothing reads the host's memory for it."""
        if self._event is not None:
            self._event.synchronize()
        self.reply, self.begun, self._passes = reply, begun, 0
        self.batches.clear()
        self.sizes.clear()
        if len(self._losses) < reply.steps:
            self._losses = self._host(reply.steps, torch.float64)

    def answers(self, reply: Reply) -> bool:
        """Tell if this is the work for a reply, which may be a copy of the one that it was begun with."""
        mine = self.reply
        return mine is not None and (
            mine is reply
            or (mine.params is reply.params and mine.buffers is reply.buffers and _numbers(mine) == _numbers(reply))
        )

    def staged(self, values: torch.Tensor) -> torch.Tensor:
        """Copy values of the host to page-locked memory, which stays as it is until the work is done."""
        key = (self._passes, values.shape)
        if key not in self._staged:
            self._staged[key] = torch.empty_like(values, pin_memory=self._pinned)
        return self._staged[key].copy_(values)

    def add(self, samples: int) -> None:
        """Take over the results of a pass of the static model but for its gradient; a call is put onto the stream."""
        self.sizes.append(samples)
        self._losses[self._passes].copy_(self._static.loss, non_blocking=True)
        self._passes += 1
        if not self._static.names:
            return
        if self._passes == 1:
            self.region.copy_(self._static.reported)
            return
        for stay, averages in self._averages.items():  # a pass weighs what it has in the norm's own average after the last one
            torch._foreach_mul_(averages, stay)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage] # it has no public name
            torch._foreach_add_(averages, self._of_pass[stay])  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage] # as above

    def end(self, samples: int) -> None:
        """Complete what is put onto the stream for the ticket."""
        self.samples = samples
        if self._passes > 1 and self._static.names:
            for stay, averages in self._averages.items():
                total = sum(stay**age for age in range(self._passes))
                torch._foreach_div_(averages, total)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage] # as above
            torch._foreach_mul_(self._counts, self._passes)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage] # as above
        if self._event is not None:
            self._event.record()

    def wait(self) -> float:
        """Wait until the work is done; return its mean loss, NaN where a pass has none."""
        if self._event is not None:
            self._event.synchronize()
        mean = weighted_mean_loss(list(zip(self._losses[: self._passes].tolist(), self.sizes, strict=True)))
        return math.nan if mean is None else mean

    def _host(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(count, dtype=dtype, pin_memory=self._pinned)


def _numbers(reply: Reply) -> tuple[int | float | None, ...]:
    return (reply.worker, reply.ticket, reply.stamp, reply.lr, reply.steps, reply.incarnation, reply.loss_scale)
