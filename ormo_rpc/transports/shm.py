"""Memory that worker and server share, on one machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from ormo_rpc.options.part import register
from ormo_rpc.transports.base import ServerSide, Transport, WorkerSide
from ormo_rpc.transports.stream.client import StreamWorkerSide
from ormo_rpc.transports.stream.server import StreamServerSide
from ormo_rpc.transports.stream.shared_memory import AVAILABLE


@register("shm")
@dataclass(frozen=True, kw_only=True)
class SharedMemory(Transport):
    """Shared memory on one machine; a worker that cannot share is refused."""

    UNAVAILABLE: ClassVar[str] = "" if AVAILABLE else "this system has no memory that could be shared (memfd_create)"

    @override
    def server_side(self) -> ServerSide:
        return StreamServerSide(share=True)

    @override
    def worker_side(self) -> WorkerSide:
        return StreamWorkerSide(share=True)
