"""Pushes and replies of a server whose parameters are on a GPU, between that and the CPU's memory.

The steps are launched on the default stream of the GPU, under the service's lock. Threads of workers copy and check their
pushes on streams of their own, so that these run beside each other, and the copies of replies have a stream, too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import torch

from ormo_rpc.kernels.page_locked import lock
from ormo_rpc.kernels.pool import Memory, anonymous, pooled
from ormo_rpc.messages import Reply
from ormo_rpc.server.validation import ValidatedPush


class GpuSide:
    """The streams and the page-locked memory of a server on a GPU; for any thread.

    `_lock` guards the newest copies: one thread at a time copies a reply, and others that wait take its copy.

    Args:
        device: The GPU.
        memory: Makes the memory that replies are copied to, as `ServerSide.memory`.
    """

    def __init__(self, device: torch.device, memory: Callable[[int], Memory] | None = None) -> None:
        self._device = device
        self._steps = torch.cuda.default_stream(device)
        self._copies = torch.cuda.Stream(device)
        self._of_thread = threading.local()
        self._memory = memory or anonymous
        self._locked: list[torch.Tensor] = []
        """All memory of the pool, whose pages are locked as long as this object exists."""
        self._empty = pooled(self._page_locked)
        self._lock = threading.Lock()
        self._newest: list[tuple[torch.Tensor, torch.Tensor]] = []
        """The newest parameters and buffers that were copied, each with its copy."""

    def reserve(self, vector: torch.Tensor, count: int) -> None:
        """Make memory for so many copies of a vector now, as locking pages takes long."""
        made = [self._room(vector) for _ in range(count)]
        del made  # so that they can be lent

    def validated(self, validate: Callable[[], ValidatedPush]) -> ValidatedPush:
        """Validate a push on the calling thread's own stream: its copies and checks.

        What is made there is in order with the steps that follow, and its memory is not used again before these have read it:
        other threads may have the same stream, of which there are 32.
        """
        stream = getattr(self._of_thread, "stream", None)
        if stream is None:
            stream = self._of_thread.stream = torch.cuda.Stream(self._device)
        stream.wait_stream(self._steps)
        with torch.cuda.stream(stream):
            made = validate()
        self._steps.wait_stream(stream)
        for tensor in made.tensors():
            if tensor.is_cuda:  # that of a rejected push may be elsewhere
                tensor.record_stream(self._steps)
        return made

    def on_host(self, reply: Reply) -> Reply:
        """Return a reply with its tensors in page-locked memory of the CPU; replies with the same tensors share the copy."""
        with self._lock:
            copies = [self._copy(reply.params), self._copy(reply.buffers)]
            self._newest = copies
        return replace(reply, params=copies[0][1], buffers=copies[1][1])

    def _copy(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if tensor.device.type == "cpu":
            return tensor, tensor
        for known in self._newest:
            if known[0] is tensor:
                return known
        room = self._room(tensor)
        self._copies.wait_stream(self._steps)
        with torch.cuda.stream(self._copies):
            room.copy_(tensor, non_blocking=True)
        self._copies.synchronize()
        return tensor, room

    def _room(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._empty(torch.empty(1, dtype=tensor.dtype).expand(tensor.numel()))

    def _page_locked(self, size: int) -> Memory:
        memory = self._memory(size)
        self._locked.append(lock(torch.frombuffer(memory, dtype=torch.uint8)))
        return memory
