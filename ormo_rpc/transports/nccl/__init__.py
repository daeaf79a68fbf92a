"""Messages of NCCL's between a worker and a server on GPUs of their own, on one machine or two.

The modules of this package that need torch.distributed are imported with the first half that is made, since not every build has
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from typing_extensions import override

from ormo_rpc.devices import gpu_count
from ormo_rpc.options.part import register
from ormo_rpc.transports.base import ServerSide, Transport, WorkerSide


@register("nccl")
@dataclass(frozen=True, kw_only=True)
class Nccl(Transport):
    """Messages of NCCL's between worker and server, each on a GPU of its own; not encrypted."""

    BETWEEN_GPUS: ClassVar[bool] = True

    @override
    @classmethod
    def unavailable(cls) -> str:
        if not (torch.distributed.is_available() and torch.distributed.is_nccl_available()):
            return "torch was built without NCCL"
        return "" if gpu_count() else "this machine has no GPU that PyTorch sees"

    @override
    def server_side(self) -> ServerSide:
        from ormo_rpc.transports.nccl.server import offered
        from ormo_rpc.transports.stream.server import StreamServerSide

        return StreamServerSide(share=False, ways={Nccl.name: offered})

    @override
    def worker_side(self) -> WorkerSide:
        from ormo_rpc.transports.nccl.client import NcclWorkerSide

        return NcclWorkerSide()
