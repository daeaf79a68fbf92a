"""Messages of Gloo's, over one of its pairs, a TCP connection, for each worker.

The modules of this package that need torch.distributed are imported with the first half that is made, since not every build has
it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.options.part import register
from ormo_rpc.transports.base import ServerSide, Transport, WorkerSide


@register("gloo")
@dataclass(frozen=True, kw_only=True)
class Gloo(Transport):
    """Messages of Gloo's over one of its pairs, a TCP connection, for each worker; not encrypted."""

    @override
    @classmethod
    def unavailable(cls) -> str:
        if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
            return "torch was built without Gloo"
        from ormo_rpc.transports.gloo.pair import DESCRIPTORS

        return "" if DESCRIPTORS.is_dir() else f"there is no {DESCRIPTORS}, in which a pair's connection is found"

    @override
    def server_side(self) -> ServerSide:
        from ormo_rpc.transports.gloo.server import GlooServerSide

        return GlooServerSide()

    @override
    def worker_side(self) -> WorkerSide:
        from ormo_rpc.transports.gloo.client import GlooWorkerSide

        return GlooWorkerSide()
