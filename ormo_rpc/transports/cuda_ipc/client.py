"""The worker's half of ``transport=cuda_ipc``."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from typing import Any

import torch
from typing_extensions import override

from ormo_rpc.errors import TransportRefused
from ormo_rpc.transports.base import Endpoint, ServerClient
from ormo_rpc.transports.between_gpus import GpuWorkerSide
from ormo_rpc.transports.cuda_ipc.server import NAME
from ormo_rpc.transports.stream.client import StreamClient, begun, connection
from ormo_rpc.transports.stream.tensor_path import Memory, Window, attach_window


class CudaIpcWorkerSide(GpuWorkerSide):
    """Opens a window of the server's on its GPU; pushes are made on the worker's, and copied there."""

    TRANSPORT = NAME

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
        gpu = self.own_gpu()
        from ormo_rpc.transports.cuda_ipc.memory import GpuMemory

        return GpuMemory(gpu)


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
