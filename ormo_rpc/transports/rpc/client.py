"""The worker's half of ``transport=rpc``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import torch
import torch.distributed.rpc as rpc
from torch import Tensor
from typing_extensions import override

from ormo_rpc.control.torch_rpc.agent import SERVER, rpc_agent
from ormo_rpc.errors import ServerLost
from ormo_rpc.messages import NO_BUFFERS, Push, Reply
from ormo_rpc.transports.base import Endpoint, ServerClient, Service, WorkerSide
from ormo_rpc.transports.codec import PUSH, REPLY, unpack_error
from ormo_rpc.transports.rpc import server


class TorchRpcWorkerSide(WorkerSide):
    """Starts an agent for as long as the worker is connected."""

    @override
    @contextlib.contextmanager
    def connect(self, endpoint: Endpoint, payload: Tensor) -> Generator[ServerClient]:
        with rpc_agent(
            f"worker{endpoint.worker}",
            host=endpoint.lease.connection.getsockname()[0],
            server=endpoint.offer["agent"],
            timeout_seconds=endpoint.timeout_seconds,
        ):
            yield TorchRpcClient(endpoint.session_id, payload, endpoint.timeout_seconds)


class TorchRpcClient(ServerClient):
    """Calls the server through the RRef that it hands out.

    After a time-out a call is repeated, which never applies a push twice, as long as the server answers at all: the reply may
    be held back for longer, at a barrier or at the end of the run, by the slowest worker. A server that does not answer a
    probe within the time-out is lost.

    Args:
        session_id: Of this worker's membership.
        payload: The wire form of every push.
        timeout_seconds: A call is repeated after this time without an answer.

    Raises:
        ServerLost: the server does not answer.
    """

    def __init__(self, session_id: str, payload: Tensor, timeout_seconds: float) -> None:
        self.session_id = session_id
        self.payload = payload
        self.timeout_seconds = timeout_seconds
        self.service = self._probe()

    @override
    def register(self) -> Reply:
        return self._insist(server.register, self.session_id)

    @override
    def push(self, push: Push) -> Reply:
        return self._insist(server.push, self.session_id, PUSH.pack(push), self.payload)

    @override
    def leave(self) -> None:
        with contextlib.suppress(ServerLost, TimeoutError):
            self._call(server.leave, (self.session_id,))

    def _probe(self) -> rpc.RRef[Service]:
        """Ask for the RRef, which a server that is alive returns at once."""
        try:
            return rpc.rpc_sync(SERVER, server.published, timeout=self.timeout_seconds)
        except RuntimeError as error:
            raise ServerLost(_first_line(error)) from None

    def _insist(self, function: Callable[..., Any], *arguments: object) -> Reply:
        """Repeat a call until there is a response."""
        while True:
            try:
                header, params = self._call(function, arguments)
            except TimeoutError:
                self.service = self._probe()
                continue
            if params is None:
                raise unpack_error(header)
            return Reply(**REPLY.unpack(header), params=params, buffers=_buffers(header))

    def _call(self, function: Callable[..., Any], arguments: tuple[object, ...]) -> Any:
        """Make one call; a time-out and a lost server raise different errors."""
        try:
            return rpc.rpc_sync(self.service.owner(), function, args=arguments, timeout=self.timeout_seconds)
        except RuntimeError as error:
            if str(error).startswith("RPCErr:1"):  # how torch marks a time-out
                raise TimeoutError(_first_line(error)) from None
            raise ServerLost(_first_line(error)) from None


def _buffers(header: bytes) -> Tensor:
    """The buffers behind a header."""
    if len(header) == REPLY.size:
        return NO_BUFFERS
    return torch.frombuffer(bytearray(header), dtype=torch.uint8, offset=REPLY.size).clone()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
