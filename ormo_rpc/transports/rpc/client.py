"""The worker's half of ``transport=rpc``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import torch
from typing_extensions import override

from ormo_rpc.control.torch_rpc.client import RpcControl
from ormo_rpc.errors import Refused, ServerLost, StaleSession
from ormo_rpc.messages import Push, Reply, no_buffers
from ormo_rpc.transports.base import Endpoint, ServerClient, WorkerSide
from ormo_rpc.transports.codec import PUSH, REPLY, unpack_error
from ormo_rpc.transports.rpc import server


class TorchRpcWorkerSide(WorkerSide):
    """Uses the agent of the control plane."""

    @override
    @contextlib.contextmanager
    def connect(self, endpoint: Endpoint, payload: torch.Tensor) -> Generator[ServerClient]:
        control = endpoint.control
        if not isinstance(control, RpcControl):
            raise Refused("transport=rpc: the server has no agent; expected runtime.control=rpc there, or another transport")
        endpoint.ask({"reason": endpoint.reason})
        yield TorchRpcClient(control, endpoint.session_id, payload)


class TorchRpcClient(ServerClient):
    """Calls the server through the RRef that it hands out.

    After a time-out a call is repeated, which never applies a push twice, as long as the server answers at all: the reply may
    be held back for longer, at a barrier or at the end of the run, by the slowest worker. A server that does not answer a
    probe within the time-out is lost.

    Args:
        control: Has the RRef.
        session_id: Of this worker's membership.
        payload: The wire form of every push.
    """

    def __init__(self, control: RpcControl, session_id: str, payload: torch.Tensor) -> None:
        self.control = control
        self.session_id = session_id
        self.payload = payload

    @override
    def register(self) -> Reply:
        return self._insist(server.register, self.session_id)

    @override
    def push(self, push: Push) -> Reply:
        return self._insist(server.push, self.session_id, PUSH.pack(push), self.payload)

    @override
    def leave(self) -> None:
        with contextlib.suppress(ServerLost, StaleSession):
            self.control.leave(self.session_id)

    def _insist(self, function: Callable[..., Any], *arguments: object) -> Reply:
        """Repeat a call until there is a response."""
        while True:
            try:
                header, params = self.control.at_owner(function, *arguments)
            except TimeoutError:
                self.control.probe()
                continue
            if params is None:
                raise unpack_error(header)
            return Reply(**REPLY.unpack(header), params=params, buffers=_buffers(header))


def _buffers(header: bytes) -> torch.Tensor:
    """The buffers behind a header."""
    if len(header) == REPLY.size:
        return no_buffers()
    return torch.frombuffer(bytearray(header), dtype=torch.uint8, offset=REPLY.size).clone()
