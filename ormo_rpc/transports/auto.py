"""For each worker the fastest transport that both sides can use."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from typing_extensions import override

from ormo_rpc.errors import Refused, ServerLost, TransportRefused
from ormo_rpc.options.part import register
from ormo_rpc.rendezvous.protocol import LineReader
from ormo_rpc.transports.base import Endpoint, ServerClient, ServerSide, Service, Transport, WorkerSide
from ormo_rpc.transports.gloo import Gloo
from ormo_rpc.transports.rpc import Rpc
from ormo_rpc.transports.shm import SharedMemory
from ormo_rpc.transports.tcp import Tcp

ORDER: tuple[type[Transport], ...] = (SharedMemory, Gloo, Tcp, Rpc)
"""A worker takes the first that works."""


@register("auto")
@dataclass(frozen=True, kw_only=True)
class Auto(Transport):
    """For each worker: shm where worker and server can share memory, else gloo, else tcp, else rpc."""

    @override
    def server_side(self) -> ServerSide:
        return AutoServerSide()

    @override
    def worker_side(self) -> WorkerSide:
        return AutoWorkerSide()


class AutoServerSide(ServerSide):
    """The halves of all transports that this machine can use."""

    def __init__(self) -> None:
        self.parts = {cls.name: cls().server_side() for cls in ORDER if not cls.unavailable()}
        streams = self.parts.get(SharedMemory.name, self.parts[Tcp.name])
        self.parts[Tcp.name] = streams  # one for both, since a connection does not tell which of them it is for
        self.memory = streams.memory
        self.functions = [function for half in self.parts.values() for function in half.functions]

    @override
    def start(self, service: Service) -> Mapping[str, Any]:
        return {name: half.start(service) for name, half in self.parts.items()}

    @override
    def accept(self, reader: LineReader) -> None:
        self.parts[Tcp.name].accept(reader)

    @override
    def session_ended(self, session_id: str) -> None:
        for half in self.parts.values():
            half.session_ended(session_id)

    @override
    def close(self) -> None:
        for half in self.parts.values():
            half.close()


class AutoWorkerSide(WorkerSide):
    """Tries transports in order.

    Payloads lie in memory that can be shared, behind the room that Gloo's messages need.
    """

    def __init__(self) -> None:
        self.halves = {cls.name: cls().worker_side() for cls in ORDER if not cls.unavailable()}

    @override
    def allocate(self, size: int) -> torch.Tensor:
        from ormo_rpc.transports.gloo.header import HEADER_BYTES

        for half in self.halves.values():
            half.page_locked = self.page_locked
        half = self.halves.get(SharedMemory.name, self.halves[Tcp.name])
        return half.allocate(HEADER_BYTES + size)[HEADER_BYTES:]

    @override
    @contextlib.contextmanager
    def connect(self, endpoint: Endpoint, payload: torch.Tensor) -> Generator[ServerClient]:
        reasons: list[str] = []
        lost = False
        for name, half in self.halves.items():
            if name not in endpoint.joined.offers:
                continue
            with ExitStack() as stack:
                part = replace(endpoint, transport=name, reason="; ".join(reasons))
                try:
                    client = stack.enter_context(half.connect(part, payload))
                except (Refused, ServerLost) as error:
                    if not endpoint.alive():
                        raise
                    lost = lost or isinstance(error, ServerLost)
                    reasons.append(error.reason if isinstance(error, TransportRefused) else str(error))
                    continue
                endpoint.chosen(name, part.reason or "worker and server share memory")
                yield client
                return
        reason = "; ".join(reasons) or "the server serves no transport that this worker has"
        raise ServerLost(reason) if lost else TransportRefused("auto", reason)
