"""The transports of GPUs: with memory of the CPU, which is all of their code but the calls of CUDA's, and on the first GPU."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage] # documented, not annotated as public
from typing_extensions import override

from ormo_rpc.transports.auto import Auto
from ormo_rpc.transports.base import ServerSide, Transport, WorkerSide
from ormo_rpc.transports.cuda_ipc import CudaIpc
from ormo_rpc.transports.cuda_ipc.client import CudaIpcWorkerSide
from ormo_rpc.transports.cuda_ipc.memory import GpuMemory
from ormo_rpc.transports.cuda_ipc.server import window_of
from ormo_rpc.transports.gloo import Gloo
from ormo_rpc.transports.nccl import Nccl
from ormo_rpc.transports.nccl.client import NcclWorkerSide
from ormo_rpc.transports.nccl.server import pair_of
from ormo_rpc.transports.stream.server import StreamServerSide
from ormo_rpc.transports.stream.tensor_path import Memory

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class FileMemory(Memory):
    """Memory in files without names, which exist as long as this object or a mapping does."""

    def __init__(self) -> None:
        self._descriptors: list[int] = []

    def __del__(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)

    @override
    def make(self, size: int) -> tuple[Tensor, Mapping[str, Any]]:
        descriptor = os.memfd_create("window")
        self._descriptors.append(descriptor)
        os.ftruncate(descriptor, size)
        return _mapped(descriptor, size), {"path": f"/proc/{os.getpid()}/fd/{descriptor}"}

    @override
    def attach(self, size: int, handle: Mapping[str, Any]) -> Tensor:
        with Path(handle["path"]).open("r+b", buffering=0) as file:
            return _mapped(file.fileno(), size)

    @override
    def copying(self) -> AbstractContextManager[None]:
        return nullcontext()


def _mapped(descriptor: int, size: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)


def gloo_group(store: Store, rank: int, device: torch.device, timeout: timedelta) -> Any:
    """A group of Gloo's, in the place of one of NCCL's."""
    del device
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    options._timeout = timeout
    return gloo(store, rank, 2, options)


class WindowOnHost(CudaIpc):
    """`cuda_ipc`, whose window lies in memory of the CPU."""

    @override
    @classmethod
    def unavailable(cls) -> str:
        return ""

    @override
    def server_side(self) -> ServerSide:
        return StreamServerSide(share=False, ways={CudaIpc.name: lambda service, _: window_of(FileMemory(), service)})

    @override
    def worker_side(self) -> WorkerSide:
        return _WindowWorkerSide()


class _WindowWorkerSide(CudaIpcWorkerSide):
    @override
    def memory(self) -> Memory:
        return FileMemory()


class WindowOnGpu(CudaIpc):
    """`cuda_ipc` of a server and of workers on the first GPU, whatever the service's device is."""

    @override
    def server_side(self) -> ServerSide:
        return StreamServerSide(share=False, ways={CudaIpc.name: lambda service, _: window_of(GpuMemory(GPU), service)})

    @override
    def worker_side(self) -> WorkerSide:
        side = super().worker_side()
        side.gpu = GPU
        return side


class PairOnHost(Nccl):
    """`nccl`, whose pairs are of Gloo's."""

    @override
    @classmethod
    def unavailable(cls) -> str:
        return Gloo.unavailable()

    @override
    def server_side(self) -> ServerSide:
        return StreamServerSide(share=False, ways={Nccl.name: lambda service, _: pair_of(service, CPU, gloo_group)})

    @override
    def worker_side(self) -> WorkerSide:
        return _PairWorkerSide()


class _PairWorkerSide(NcclWorkerSide):
    make_group = staticmethod(gloo_group)

    @override
    def identity(self) -> str:
        return "none"


class AutoWithoutIpc(Auto):
    """`auto` of a worker whose pushes are made where no transport here can send them from; that is the CPU, too."""

    @override
    def worker_side(self) -> WorkerSide:
        side = super().worker_side()
        side.gpu = CPU
        return side


ON_HOST: Mapping[str, type[Transport]] = {CudaIpc.name: WindowOnHost, Nccl.name: PairOnHost}
"""By the names of those that they stand for."""
