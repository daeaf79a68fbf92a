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
from ormo_rpc.messages import Push, Reply
from ormo_rpc.options.part import register
from ormo_rpc.options.section import option
from ormo_rpc.rendezvous.protocol import LineReader
from ormo_rpc.transports.base import Endpoint, ServerClient, ServerSide, Service, Transport, WorkerSide
from ormo_rpc.transports.cuda_ipc import CudaIpc
from ormo_rpc.transports.gloo import Gloo
from ormo_rpc.transports.nccl import Nccl
from ormo_rpc.transports.rpc import Rpc
from ormo_rpc.transports.shm import SharedMemory
from ormo_rpc.transports.tcp import Tcp

ORDER: tuple[type[Transport], ...] = (SharedMemory, Gloo, Tcp, Rpc)
"""A worker takes the first that works."""
ON_GPUS: tuple[type[Transport], ...] = (CudaIpc, Nccl)
"""Before them, where worker and server are on GPUs; the last one where it is asked for."""
_REASONS = {CudaIpc.name: "worker and server share memory of a GPU", SharedMemory.name: "worker and server share memory"}
"""Of those that are chosen at once."""


@register("auto")
@dataclass(frozen=True, kw_only=True)
class Auto(Transport):
    """For each worker: cuda_ipc where both sides are on GPUs of one machine, shm where they share memory, gloo, tcp or rpc."""

    nccl: bool = option(False, "take nccl where both sides are on GPUs that share no memory, before any other")

    @override
    def server_side(self) -> ServerSide:
        return AutoServerSide(nccl=self.nccl)

    @override
    def worker_side(self) -> WorkerSide:
        return AutoWorkerSide(nccl=self.nccl)


class AutoServerSide(ServerSide):
    """The halves of all transports that this machine can use.

    Args:
        nccl: Whether nccl is one of them.
    """

    def __init__(self, *, nccl: bool = False) -> None:
        self._on_gpus = _on_gpus(nccl=nccl)
        self.parts = {cls.name: cls().server_side() for cls in ORDER if not cls.unavailable()}
        streams = self.parts.get(SharedMemory.name, self.parts[Tcp.name])
        self.parts[Tcp.name] = streams  # one for all of them, since a connection does not tell which of them it is for
        self.memory = streams.memory
        self.functions = [function for half in self.parts.values() for function in half.functions]

    @override
    def start(self, service: Service) -> Mapping[str, Any]:
        if service.device.type == "cuda":
            self._serve_gpus()
        return {name: half.start(service) for name, half in self.parts.items()}

    def _serve_gpus(self) -> None:
        from ormo_rpc.transports.stream.server import StreamServerSide

        streams = self.parts[Tcp.name]
        assert isinstance(streams, StreamServerSide), "tcp is one"
        halves = {cls.name: cls().server_side() for cls in self._on_gpus}
        for half in halves.values():
            assert isinstance(half, StreamServerSide), "so are these"
            streams.ways |= half.ways
        self.parts = {**dict.fromkeys(halves, streams), **self.parts}

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

    Payloads lie in memory that can be shared, behind the room that Gloo's messages need; or on a GPU, and are copied to such
    memory where they cannot stay there.

    Args:
        nccl: Whether to try nccl, too.
    """

    def __init__(self, *, nccl: bool = False) -> None:
        usable = (*_on_gpus(nccl=nccl), *(cls for cls in ORDER if not cls.unavailable()))
        self.halves = {cls.name: cls().worker_side() for cls in usable}
        self._on_host: torch.Tensor | None = None
        """The memory that a payload on a GPU is copied to."""

    @override
    def allocate(self, size: int) -> torch.Tensor:
        if self.gpu is None:
            return self._allocate_on_host(size)
        for half in self.halves.values():
            half.gpu = self.gpu
        return torch.zeros(size, dtype=torch.uint8, device=self.gpu)

    def _allocate_on_host(self, size: int) -> torch.Tensor:
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
                    client = stack.enter_context(self._connected(half, part, payload))
                except (Refused, ServerLost) as error:
                    if not endpoint.alive():
                        raise
                    lost = lost or isinstance(error, ServerLost)
                    reasons.append(error.reason if isinstance(error, TransportRefused) else str(error))
                    continue
                endpoint.chosen(name, part.reason or _REASONS.get(name, "the first that both sides have"))
                yield client
                return
        reason = "; ".join(reasons) or "the server serves no transport that this worker has"
        raise ServerLost(reason) if lost else TransportRefused("auto", reason)

    @contextlib.contextmanager
    def _connected(self, half: WorkerSide, endpoint: Endpoint, payload: torch.Tensor) -> Generator[ServerClient]:
        """Connect by one of the transports, with the payload where that one can send it from."""
        if self.gpu is None or any(endpoint.transport == cls.name for cls in ON_GPUS):
            with half.connect(endpoint, payload) as client:
                yield client
            return
        if self._on_host is None:
            self._on_host = self._allocate_on_host(payload.numel() * payload.itemsize)
        on_host = self._on_host.view(payload.dtype)
        with half.connect(endpoint, on_host) as client:
            yield _CopyingClient(client, payload, on_host)


def _on_gpus(*, nccl: bool) -> list[type[Transport]]:
    """The transports between GPUs that this machine can use."""
    return [cls for cls in ON_GPUS if (nccl or cls is not Nccl) and not cls.unavailable()]


class _CopyingClient(ServerClient):
    """Copies each push from a GPU for a client that sends it from the CPU's memory.

    Args:
        client: The client.
        payload: The wire form of every push.
        on_host: The memory that the client sends from.
    """

    def __init__(self, client: ServerClient, payload: torch.Tensor, on_host: torch.Tensor) -> None:
        self._client = client
        self._payload = payload
        self._on_host = on_host

    @override
    def register(self) -> Reply:
        return self._client.register()

    @override
    def push(self, push: Push) -> Reply:
        self._on_host.copy_(self._payload)
        return self._client.push(push)

    @override
    def leave(self) -> None:
        self._client.leave()
