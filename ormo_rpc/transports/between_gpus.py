"""Parts that the transports between GPUs share: the place of a worker's pushes, and reasons for which neither is possible."""

from __future__ import annotations

from typing import ClassVar

import torch
from typing_extensions import override

from ormo_rpc.errors import TransportRefused
from ormo_rpc.transports.base import Service, WorkerSide
from ormo_rpc.transports.stream.tensor_path import Sizes


class GpuWorkerSide(WorkerSide):
    """A worker's half whose pushes stay on GPUs.

    Attributes:
        TRANSPORT: The name of the transport.
    """

    TRANSPORT: ClassVar[str]

    @override
    def allocate(self, size: int) -> torch.Tensor:
        return super().allocate(size) if self.gpu is None else torch.zeros(size, dtype=torch.uint8, device=self.gpu)

    def own_gpu(self) -> torch.device:
        """Return the GPU of this worker.

        Raises:
            TransportRefused: it has none, or the server has none.
        """
        if self.gpu is None:
            raise TransportRefused(self.TRANSPORT, "worker.device and server.device are not both on a GPU")
        return self.gpu


def refuse_off_gpu(name: str, service: Service) -> None:
    """Refuse a server whose parameters are not on a GPU.

    Raises:
        TransportRefused: they are not.
    """
    if service.device.type != "cuda":
        raise TransportRefused(name, "the server's parameters are not on a GPU")


def sizes_of(name: str, service: Service) -> Sizes:
    """Return the sizes of what crosses between a server and its workers.

    Raises:
        TransportRefused: pushes have to be unpacked on the CPU.
    """
    if not service.push_format.plain:
        raise TransportRefused(name, "compressed pushes are unpacked on the CPU")
    reply = service.reply_size
    return Sizes(push=service.push_format.size, params=reply.params, buffers=reply.buffers)
