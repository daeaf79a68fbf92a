"""Reads the pushes of one worker out of the memory that they arrive in, which is always the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ormo_rpc.compression.format import PushFormat
from ormo_rpc.compression.wire_buffers import WireBuffers
from ormo_rpc.messages import Push


class PushReader:
    """Makes a `Push` of its numbers and of the payload that has arrived; a plain one is a view, which is made once.

    Args:
        form: The wire form of pushes.
        payload: The memory of the payload, uint8, shape (size,).
        shared: Whether the worker can still change it. Buffers are then copied before they are read, since a number of calls
            that is none would end a commit halfway.
    """

    def __init__(self, form: PushFormat, payload: torch.Tensor, *, shared: bool = False) -> None:
        self._form = form
        self._payload = payload
        self._decoded = None if form.plain else torch.empty(form.length, dtype=form.dtype)
        self._pushed = form.buffer_region.of(payload)
        self._buffers = torch.empty_like(self._pushed) if shared and self._pushed.numel() else self._pushed
        self._views = (form.whole(payload), WireBuffers(form.buffers, self._buffers)) if form.plain else None
        self._metrics = form.wire_metrics(payload) if form.metrics else None

    def read(self, numbers: Mapping[str, Any]) -> Push:
        """The push; its tensors hold until the next one arrives.

        Raises:
            PushRefused: the payload is no valid push.
        """
        if self._buffers is not self._pushed:
            self._buffers.copy_(self._pushed)
        if self._views is None:
            grad, buffers = self._form.unpack(self._payload, self._decoded)
        else:
            grad, buffers = self._views[0], self._views[1].read()
        if self._metrics is None:
            return Push(**numbers, grad=grad, buffers=buffers)
        return Push(**numbers, grad=grad, buffers=buffers, metrics=self._metrics.read())
