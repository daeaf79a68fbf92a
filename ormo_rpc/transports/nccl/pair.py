"""A pair of processes between which tensors cross: a group of two, whose messages frames announce.

Send and receive of one communicator run in order, so each side calls them in the order in which tensors cross: the worker sends
a push and receives the reply, the server receives the push and sends the reply. A message is begun once its frame has come or
has left, so that no kernel waits on a GPU for what may not come.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import torch
from typing_extensions import override

from ormo_rpc.errors import one_line
from ormo_rpc.transports.nccl.group import WORKER
from ormo_rpc.transports.stream.tensor_path import Sizes, TensorPath


class Pair(TensorPath):
    """One side of a pair. `_closed` is set by any thread.

    Args:
        group: A group of two, of NCCL's or with the same calls.
        rank: This side's.
        device: Of the tensors.
        sizes: Of what crosses.
    """

    def __init__(self, group: Any, rank: int, device: torch.device, sizes: Sizes) -> None:
        def room(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.uint8, device=device)

        on_worker = rank == WORKER
        self.push = room(0 if on_worker else sizes.push)
        self.params = room(sizes.params if on_worker else 0)
        self.buffers = room(sizes.buffers if on_worker else 0)
        self._group = group
        self._other = WORKER - rank
        self._device = device
        self._ready: list[torch.Tensor] = []
        self._closed = threading.Event()

    @override
    def ready_push(self, payload: torch.Tensor) -> None:
        self._ready = [payload.view(torch.uint8)]

    @override
    def ready_reply(self, params: torch.Tensor, buffers: torch.Tensor) -> None:
        self._ready = [each.detach().view(torch.uint8).to(self._device) for each in (params, buffers)]

    @override
    def deliver(self) -> None:
        ready, self._ready = self._ready, []
        for tensor in ready:
            self._transfer(self._group.send, tensor)
        self._finish()

    @override
    def fetch_push(self) -> None:
        self._transfer(self._group.recv, self.push)
        self._finish()

    @override
    def fetch_reply(self, params: int, buffers: int) -> None:
        self._transfer(self._group.recv, self.params[:params])
        self._transfer(self._group.recv, self.buffers[:buffers])
        self._finish()

    @override
    def close(self) -> None:
        if not self._closed.is_set():
            self._closed.set()
            with contextlib.suppress(RuntimeError):  # it has been lost before
                self._group.abort()

    def _transfer(self, call: Any, tensor: torch.Tensor) -> None:
        """Begin with a message, and order what this thread does with its memory behind it."""
        if not tensor.numel():
            return
        try:
            call([tensor], self._other, 0).wait()
        except RuntimeError as error:
            raise EOFError(f"the pair has ended: {one_line(error)}") from None

    def _finish(self) -> None:
        """Wait until the messages have crossed, or the pair is closed, which frees those that have not."""
        try:
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
        except RuntimeError as error:
            raise EOFError(f"the pair has ended: {one_line(error)}") from None
        if self._closed.is_set():
            raise EOFError("the pair is closed")
