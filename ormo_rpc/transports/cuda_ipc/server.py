"""The server's half of ``transport=cuda_ipc``: a window of its GPU's memory for each worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ormo_rpc.errors import TransportRefused
from ormo_rpc.transports.base import Service
from ormo_rpc.transports.between_gpus import refuse_off_gpu, sizes_of
from ormo_rpc.transports.cuda_ipc.memory import GpuMemory
from ormo_rpc.transports.stream.tensor_path import Memory, Offer, make_window

NAME = "cuda_ipc"


def offered(service: Service, request: Mapping[str, Any]) -> Offer:
    """Offer a window of the memory of the GPU that has the server's parameters (`tensor_path.Way`)."""
    del request
    refuse_off_gpu(NAME, service)
    return window_of(GpuMemory(service.device), service)


def window_of(memory: Memory, service: Service) -> Offer:
    """Offer a window.

    Raises:
        TransportRefused: it cannot be made, or pushes have to be unpacked on the CPU.
    """
    sizes = sizes_of(NAME, service)
    try:
        window, made = make_window(memory, sizes)
    except RuntimeError as error:
        raise TransportRefused(NAME, f"the server cannot share memory of its GPU: {error}") from None
    return Offer(answer=made, open=lambda _: window)
