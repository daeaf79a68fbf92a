"""Memory of one GPU that worker and server share, or of two GPUs of one machine."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar

import torch
from typing_extensions import override

from ormo_rpc.devices import gpu_count
from ormo_rpc.options.part import register
from ormo_rpc.transports.base import ServerSide, Transport, WorkerSide


@register("cuda_ipc")
@dataclass(frozen=True, kw_only=True)
class CudaIpc(Transport):
    """Memory of a GPU that worker and server share, both on GPUs of one machine; a worker that cannot is refused."""

    BETWEEN_GPUS: ClassVar[bool] = True

    @override
    @classmethod
    def unavailable(cls) -> str:
        if sys.platform != "linux":
            return "this system has no memory of a GPU that processes could share"
        if not torch.version.cuda:
            return "torch was built without CUDA"
        return "" if gpu_count() else "this machine has no GPU that PyTorch sees"

    @override
    def server_side(self) -> ServerSide:
        from ormo_rpc.transports.cuda_ipc.server import offered
        from ormo_rpc.transports.stream.server import StreamServerSide

        return StreamServerSide(share=False, ways={CudaIpc.name: offered})

    @override
    def worker_side(self) -> WorkerSide:
        from ormo_rpc.transports.cuda_ipc.client import CudaIpcWorkerSide

        return CudaIpcWorkerSide()
