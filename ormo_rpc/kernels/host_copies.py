"""Copies from a GPU's memory to the CPU's, of whatever holds tensors.

They go through page-locked memory of a fixed size, on a stream of their own: what is launched on other streams goes on beside
them, and only the calling thread waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

PART = 32 << 20
"""Bytes that are copied at a time; two parts of page-locked memory take turns, one to be filled and one to be emptied."""
T = TypeVar("T")


def on_host(value: T) -> T:
    """Return a value with its tensors on the CPU, in dictionaries, lists and tuples of any depth; those that are there stay.

    A tensor that comes up several times is copied once.
    """
    return _Copier().copied(value)


class _Copier:
    """One pass over a value."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], torch.Tensor] = {}
        self._staging: dict[torch.device, _Staging] = {}

    def copied(self, value: Any) -> Any:
        """Return the value with its tensors on the CPU."""
        if isinstance(value, torch.Tensor):
            return value if value.device.type == "cpu" else self._tensor(value.detach())
        if isinstance(value, Mapping):
            return {key: self.copied(each) for key, each in value.items()}
        if type(value) in (list, tuple):
            return type(value)(map(self.copied, value))
        return value

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in self._made:
            if tensor.device not in self._staging:
                self._staging[tensor.device] = _Staging(tensor.device)
            self._made[key] = self._staging[tensor.device].copied(tensor)
        return self._made[key]


class _Staging:
    """Two parts of page-locked memory, and a stream that waits for what the calling thread has launched before each copy.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._parts = deque[torch.Tensor]()

    def copied(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor, which nobody changes meanwhile, and wait for it."""
        made = torch.empty(tensor.shape, dtype=tensor.dtype)
        if not tensor.numel():
            return made
        source, target = (each.contiguous().reshape(-1).view(torch.uint8) for each in (tensor, made))
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        under_way = deque[tuple[torch.Tensor, torch.Tensor, torch.cuda.Event]]()
        for taken, room in zip(source.split(PART), target.split(PART), strict=True):
            if len(under_way) == 2:
                self._empty(*under_way.popleft())
            part = self._parts.popleft() if self._parts else torch.empty(PART, dtype=torch.uint8, pin_memory=True)
            with torch.cuda.stream(self._stream):
                part[: taken.numel()].copy_(taken, non_blocking=True)
                event = torch.cuda.Event()
                event.record(self._stream)
            under_way.append((part, room, event))
        while under_way:
            self._empty(*under_way.popleft())
        return made

    def _empty(self, part: torch.Tensor, room: torch.Tensor, event: torch.cuda.Event) -> None:
        event.synchronize()
        room.copy_(part[: room.numel()])
        self._parts.append(part)
