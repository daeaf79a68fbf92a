"""Frames on a TCP connection, from and into buffers that are made once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from ormo_rpc.options.part import register
from ormo_rpc.transports.base import ServerSide, Transport, WorkerSide


@register("tcp")
@dataclass(frozen=True, kw_only=True)
class Tcp(Transport):
    """Frames on a TCP connection, authenticated and not encrypted."""

    AVOIDS_RPC: ClassVar[bool] = True

    @override
    def server_side(self) -> ServerSide:
        from ormo_rpc.transports.stream.server import StreamServerSide

        return StreamServerSide(share=False)

    @override
    def worker_side(self) -> WorkerSide:
        from ormo_rpc.transports.stream.client import StreamWorkerSide

        return StreamWorkerSide(share=False)
