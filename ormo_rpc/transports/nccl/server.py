"""The server's half of ``transport=nccl``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from ormo_rpc.devices import card_id
from ormo_rpc.errors import TransportRefused
from ormo_rpc.rendezvous.protocol import LineReader
from ormo_rpc.transports.base import Service
from ormo_rpc.transports.between_gpus import refuse_off_gpu, sizes_of
from ormo_rpc.transports.nccl.group import SERVER, MakeGroup, connected_group, nccl_group
from ormo_rpc.transports.nccl.pair import Pair
from ormo_rpc.transports.stream.tensor_path import Offer, TensorPath

NAME = "nccl"


def offered(service: Service, request: Mapping[str, Any]) -> Offer:
    """Offer a pair to a worker on another GPU (`tensor_path.Way`)."""
    refuse_off_gpu(NAME, service)
    if request.get("gpu") == card_id(service.device):
        raise TransportRefused(NAME, "worker and server are on one GPU, between which NCCL carries nothing")
    return pair_of(service, service.device, nccl_group)


def pair_of(service: Service, device: torch.device, make: MakeGroup) -> Offer:
    """Offer a pair.

    Raises:
        TransportRefused: pushes have to be unpacked on the CPU.
    """
    sizes = sizes_of(NAME, service)

    def opened(reader: LineReader) -> TensorPath:
        return Pair(connected_group(make, reader, SERVER, device), SERVER, device, sizes)

    return Offer(answer=asdict(sizes), open=opened)
