"""The server's half of ``transport=cuda_ipc``: a window of its GPU's memory for each worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ormo_rpc.errors import TransportRefused
from ormo_rpc.transports.base import Service
from ormo_rpc.transports.cuda_ipc.memory import GpuMemory
from ormo_rpc.transports.stream.tensor_path import Memory, Offer, Sizes, make_window

NAME = "cuda_ipc"


def offered(service: Service, request: Mapping[str, Any]) -> Offer:
    """Offer a window of the memory of the GPU that has the server's parameters (`tensor_path.Way`)."""
    del request
    if service.device.type != "cuda":
        raise TransportRefused(NAME, "the server's parameters are not on a GPU")
    return window_of(GpuMemory(service.device), service)


def window_of(memory: Memory, service: Service) -> Offer:
    """Offer a window.

    Raises:
        TransportRefused: it cannot be made, or pushes have to be unpacked on the CPU.
    """
    if not service.push_format.plain:
        raise TransportRefused(NAME, "compressed pushes are unpacked on the CPU")
    reply = service.reply_size
    try:
        window, made = make_window(memory, Sizes(push=service.push_format.size, params=reply.params, buffers=reply.buffers))
    except RuntimeError as error:
        raise TransportRefused(NAME, f"the server cannot share memory of its GPU: {error}") from None
    return Offer(answer=made, open=lambda _: window)
