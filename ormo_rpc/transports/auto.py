"""Shared memory for each worker that can share it with the server, TCP for the others."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from ormo_rpc.options.part import register
from ormo_rpc.transports.base import ServerSide, Transport, WorkerSide
from ormo_rpc.transports.stream.client import StreamWorkerSide
from ormo_rpc.transports.stream.server import StreamServerSide


@register("auto")
@dataclass(frozen=True, kw_only=True)
class Auto(Transport):
    """For each worker: shm where worker and server can share memory, else tcp."""

    @override
    def server_side(self, *, num_workers: int, timeout_seconds: float) -> ServerSide:
        return StreamServerSide(share=True)

    @override
    def worker_side(self) -> WorkerSide:
        return StreamWorkerSide(share=True)
