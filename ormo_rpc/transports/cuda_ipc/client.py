"""The worker's half of ``transport=cuda_ipc``."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from typing import Any

import torch
from typing_extensions import override

from ormo_rpc.errors import TransportRefused
from ormo_rpc.transports.base import Endpoint, ServerClient, WorkerSide
from ormo_rpc.transports.cuda_ipc.server import NAME
from ormo_rpc.transports.stream.client import StreamClient, begun, connection
from ormo_rpc.transports.stream.tensor_path import Memory, Window, attach_window


class CudaIpcWorkerSide(WorkerSide):
    """Opens a window of the server's on its GPU; pushes are made on the worker's, and copied there."""

    @override
    def allocate(self, size: int) -> torch.Tensor:
        return super().allocate(size) if self.gpu is None else torch.zeros(size, dtype=torch.uint8, device=self.gpu)

    @override
    @contextlib.contextmanager
    def connect(self, endpoint: Endpoint, payload: torch.Tensor) -> Generator[ServerClient]:
        memory = self.memory()
        with connection(endpoint, payload, {"way": NAME}) as (reader, answer):
            window = _opened(memory, answer)
            stream = begun(reader, endpoint, shared=True, reason="worker and server share memory of a GPU")
            yield StreamClient(stream, payload, None, tensors=window)

    def memory(self) -> Memory:
        """The memory of this process's GPU.

        Raises:
            TransportRefused: it has none.
        """
        if self.gpu is None:
            raise TransportRefused(NAME, "worker.device and server.device are not both on a GPU")
        from ormo_rpc.transports.cuda_ipc.memory import GpuMemory

        return GpuMemory(self.gpu)


def _opened(memory: Memory, answer: Mapping[str, Any]) -> Window:
    """The window of an answer.

    Raises:
        TransportRefused: there is none, or it cannot be opened.
    """
    if answer["offer"] is None:
        raise TransportRefused(NAME, str(answer["reason"]))
    try:
        return attach_window(memory, answer["offer"])
    except (RuntimeError, ValueError, OSError) as error:
        raise TransportRefused(NAME, f"memory of the server's GPU cannot be opened: {error}") from None
