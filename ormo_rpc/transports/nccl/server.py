"""The server's half of ``transport=nccl``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ormo_rpc.errors import TransportRefused
from ormo_rpc.rendezvous.protocol import LineReader
from ormo_rpc.transports.base import Service
from ormo_rpc.transports.cuda_ipc.runtime import identity
from ormo_rpc.transports.nccl.group import SERVER, MakeGroup, connected_group, nccl_group
from ormo_rpc.transports.nccl.pair import Pair
from ormo_rpc.transports.stream.tensor_path import Offer, Sizes, TensorPath

NAME = "nccl"


def offered(service: Service, request: Mapping[str, Any]) -> Offer:
    """Offer a pair to a worker on another GPU (`tensor_path.Way`)."""
    if service.device.type != "cuda":
        raise TransportRefused(NAME, "the server's parameters are not on a GPU")
    if request.get("gpu") == identity(service.device):
        raise TransportRefused(NAME, "worker and server are on one GPU, between which NCCL carries nothing")
    return pair_of(service, service.device, nccl_group)


def pair_of(service: Service, device: torch.device, make: MakeGroup) -> Offer:
    """Offer a pair.

    Raises:
        TransportRefused: pushes have to be unpacked on the CPU.
    """
    if not service.push_format.plain:
        raise TransportRefused(NAME, "compressed pushes are unpacked on the CPU")
    reply = service.reply_size
    sizes = Sizes(push=service.push_format.size, params=reply.params, buffers=reply.buffers)

    def opened(reader: LineReader) -> TensorPath:
        return Pair(connected_group(make, reader, SERVER, device), SERVER, device, sizes)

    return Offer(answer={"push": sizes.push, "params": sizes.params, "buffers": sizes.buffers}, open=opened)
