"""The worker's half of ``transport=nccl``."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import torch
from typing_extensions import override

from ormo_rpc.devices import card_id
from ormo_rpc.errors import ServerLost, TransportRefused
from ormo_rpc.transports.base import Endpoint, ServerClient
from ormo_rpc.transports.between_gpus import GpuWorkerSide
from ormo_rpc.transports.lease_watch import closed_with_lease
from ormo_rpc.transports.nccl.group import WORKER, MakeGroup, connected_group, nccl_group
from ormo_rpc.transports.nccl.pair import Pair
from ormo_rpc.transports.nccl.server import NAME
from ormo_rpc.transports.stream.client import StreamClient, begun, connection
from ormo_rpc.transports.stream.tensor_path import Sizes


class NcclWorkerSide(GpuWorkerSide):
    """Connects by a pair.

    Attributes:
        make_group: Makes this side's group.
    """

    TRANSPORT = NAME
    make_group: MakeGroup = staticmethod(nccl_group)

    @override
    @contextlib.contextmanager
    def connect(self, endpoint: Endpoint, payload: torch.Tensor) -> Generator[ServerClient]:
        with connection(endpoint, payload, {"way": NAME, "gpu": self.identity()}) as (reader, answer):
            if answer["offer"] is None:
                raise TransportRefused(NAME, str(answer["reason"]))
            try:
                group = connected_group(self.make_group, reader, WORKER, payload.device)
            except ValueError as error:
                raise TransportRefused(NAME, f"no pair can be made: {error}") from None
            except (OSError, EOFError) as error:
                raise ServerLost(f"nccl: no pair with the server: {error}") from None
            pair = Pair(group, WORKER, payload.device, Sizes(**answer["offer"]))
            with closed_with_lease(endpoint, pair.close):
                stream = begun(reader, endpoint, shared=True, reason=endpoint.reason)
                yield StreamClient(stream, payload, None, tensors=pair)

    def identity(self) -> str:
        """The number of this worker's GPU.

        Raises:
            TransportRefused: it has none.
        """
        return card_id(self.own_gpu())
