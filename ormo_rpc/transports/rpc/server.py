"""The server's half of ``transport=rpc``: functions that workers call by name; each finds the service by the RRef.

Each returns at once, with a Future where the reply is still to come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed.rpc as rpc
from torch.distributed.rpc.internal import RemoteException
from torch.futures import Future
from typing_extensions import override

from ormo_rpc.control.torch_rpc.server import published
from ormo_rpc.errors import PushRefused
from ormo_rpc.messages import ErrorReply, Push
from ormo_rpc.rendezvous.protocol import printable
from ormo_rpc.transports.base import MAX_REASON_CHARACTERS, ServerSide, Service
from ormo_rpc.transports.codec import PUSH, REPLY, pack_error
from ormo_rpc.transports.pending_replies import ReplyFuture, ServerResponse, refusals_as_replies

Response = tuple[bytes, torch.Tensor | None]
"""The header of a reply, with the buffers behind it, and the parameters; or JSON and None for an error."""


@rpc.functions.async_execution
def register(session_id: str) -> Future[Response]:
    """Make a worker available for work."""
    return _dispatched(lambda service: service.register(session_id))


@rpc.functions.async_execution
def push(session_id: str, header: bytes, payload: torch.Tensor) -> Future[Response]:
    """Deliver a push: its numbers, and its wire form as a tensor."""
    return _dispatched(lambda service: service.push(session_id, _unpacked(service, header, payload)))


def _dispatched(call: Callable[[Service], ReplyFuture]) -> Future[Response]:
    """Make a call in a thread of the dispatcher; its reply completes the future of torch's RPC."""
    server = published().local_value()
    future = Future[Response]()

    def run() -> None:
        pending = refusals_as_replies(lambda: call(server.service))
        pending.add_done_callback(lambda done: future.set_result(_packed(server.service, done.value())))

    server.dispatcher.submit(run, failed=lambda error: future.set_result(_failed(error)))
    return future


def _failed(error: Exception) -> Any:
    """A result that torch raises at the caller. The exception itself would be an object that no peer's allow-list takes."""
    return RemoteException(f"{type(error).__name__}: {error}", RuntimeError)


def _unpacked(service: Service, header: bytes, payload: torch.Tensor) -> Push:
    if type(header) is not bytes or len(header) != PUSH.size:
        raise PushRefused(f"push: header: expected {PUSH.size} bytes; worker and server must have the same version")
    grad, buffers = service.push_format.unpack(payload)
    metrics = service.push_format.wire_metrics(payload).read()
    return Push(**PUSH.unpack(header), grad=grad, buffers=buffers, metrics=metrics)


def _packed(service: Service, response: ServerResponse) -> Response:
    if isinstance(response, ErrorReply):
        return pack_error(response), None
    response = service.on_host(response)
    if response.ticket is None:
        return REPLY.pack(response), torch.empty(0)
    return REPLY.pack(response) + response.buffers.numpy().tobytes(), response.params


CALLED_BY_WORKERS = (register, push)
"""The functions that a peer may call in the server's process."""


class TorchRpcServerSide(ServerSide):
    """Serves through the server's agent."""

    functions = CALLED_BY_WORKERS

    @override
    def answer(self, session_id: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
        self.service.connected(session_id, "rpc", printable(request.get("reason"), MAX_REASON_CHARACTERS))
        return {}
