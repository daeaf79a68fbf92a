"""Memory of a GPU that two processes of one machine share."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from typing import Any

import torch
from typing_extensions import override

from ormo_rpc.devices import card_id
from ormo_rpc.transports.cuda_ipc import runtime
from ormo_rpc.transports.stream.tensor_path import Memory


class GpuMemory(Memory):
    """Memory of one GPU.

    Args:
        device: The GPU of this process; the other one's may be another.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        """Of copies: another loop of a worker's process may compute meanwhile, and other workers' steps be launched."""

    @override
    def make(self, size: int) -> tuple[torch.Tensor, Mapping[str, Any]]:
        tensor, handle = runtime.make(self._device, size)
        return tensor, {"gpu": card_id(self._device), "ipc": handle.hex()}

    @override
    def attach(self, size: int, handle: Mapping[str, Any]) -> torch.Tensor:
        device = runtime.device_of(handle["gpu"])
        if device is None:
            raise ValueError("this process does not see the server's GPU: another machine, or CUDA_VISIBLE_DEVICES hides it")
        return runtime.attach(device, size, bytes.fromhex(handle["ipc"]))

    @override
    @contextlib.contextmanager
    def copying(self) -> Generator[None]:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()
