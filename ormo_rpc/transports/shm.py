"""Memory that worker and server share, on one machine."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from typing_extensions import override

from ormo_rpc.options.part import register
from ormo_rpc.transports.base import ServerSide, Transport, WorkerSide


@register("shm")
@dataclass(frozen=True, kw_only=True)
class SharedMemory(Transport):
    """Shared memory on one machine; a worker that cannot share is refused."""

    @override
    @classmethod
    def unavailable(cls) -> str:
        return "" if sys.platform == "linux" else "this system has no memory that could be shared (memfd_create)"

    @override
    def server_side(self) -> ServerSide:
        from ormo_rpc.transports.stream.server import StreamServerSide

        return StreamServerSide(share=True)

    @override
    def worker_side(self) -> WorkerSide:
        from ormo_rpc.transports.stream.client import StreamWorkerSide

        return StreamWorkerSide(share=True)
