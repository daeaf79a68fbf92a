"""Messages of torch.distributed.rpc over TCP, through an RRef to the server's service.

The modules of this package that need torch's RPC are imported with the first half that is made, since not every build has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from ormo_rpc.control import torch_rpc
from ormo_rpc.options.part import register
from ormo_rpc.transports.base import ServerSide, Transport, WorkerSide


@register("rpc")
@dataclass(frozen=True, kw_only=True)
class Rpc(Transport):
    """torch.distributed.rpc over TCP, with an RRef to the server's service."""

    NEEDS_RPC: ClassVar[bool] = True

    @override
    @classmethod
    def unavailable(cls) -> str:
        return torch_rpc.unavailable()

    @override
    def server_side(self) -> ServerSide:
        from ormo_rpc.transports.rpc.server import TorchRpcServerSide

        return TorchRpcServerSide()

    @override
    def worker_side(self) -> WorkerSide:
        from ormo_rpc.transports.rpc.client import TorchRpcWorkerSide

        return TorchRpcWorkerSide()
