"""Messages of Gloo's, over one of its pairs, a TCP connection, for each worker.

The modules of this package that need torch.distributed are imported with the first half that is made, since not every build has
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.distributed as dist
from typing_extensions import override

from ormo_rpc.options.part import register
from ormo_rpc.transports.base import ServerSide, Transport, WorkerSide
from ormo_rpc.transports.stream.frames import REQUEST_BYTES

HEADER_BYTES = 64 * -(-REQUEST_BYTES // 64)
"""The room for the numbers of a push in front of its payload, which begins at a multiple of 64."""


@register("gloo")
@dataclass(frozen=True, kw_only=True)
class Gloo(Transport):
    """Messages of Gloo's over one of its pairs, a TCP connection, for each worker; not encrypted."""

    UNAVAILABLE: ClassVar[str] = "" if dist.is_available() and dist.is_gloo_available() else "torch was built without Gloo"

    @override
    def server_side(self) -> ServerSide:
        from ormo_rpc.transports.gloo.server import GlooServerSide

        return GlooServerSide()

    @override
    def worker_side(self) -> WorkerSide:
        from ormo_rpc.transports.gloo.client import GlooWorkerSide

        return GlooWorkerSide()
