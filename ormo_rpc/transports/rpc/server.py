"""The server's half of ``transport=rpc``: functions that workers call by name; each finds the service by an RRef.

Each returns at once, with a Future; the agent's threads, which are confined, only hand the work over.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed.rpc as rpc
from torch import Tensor
from torch.futures import Future
from typing_extensions import override

from ormo_rpc.control.torch_rpc.agent import SERVER, rpc_agent
from ormo_rpc.control.torch_rpc.dispatch import Dispatcher
from ormo_rpc.errors import PushRefused
from ormo_rpc.messages import ErrorReply, Push
from ormo_rpc.rendezvous.addresses import interface_address
from ormo_rpc.transports.base import ServerSide, Service
from ormo_rpc.transports.codec import PUSH, REPLY, pack_error
from ormo_rpc.transports.pending_replies import ReplyFuture, ServerResponse, refusals_as_replies

Response = tuple[bytes, Tensor | None]
"""The header of a reply, with the buffers behind it, and the parameters; or JSON and None for an error."""
DEFAULT_THREADS = 16
"""The number of threads of an agent that run handlers, unless there are more workers."""


@rpc.functions.async_execution
def register(session_id: str) -> Future[Response]:
    """Make a worker available for work."""
    return _dispatched(lambda: refusals_as_replies(lambda: published().local_value().register(session_id)))


@rpc.functions.async_execution
def push(session_id: str, header: bytes, payload: Tensor) -> Future[Response]:
    """Deliver a push: its numbers, and its wire form as a tensor."""
    service = published().local_value()
    return _dispatched(lambda: refusals_as_replies(lambda: service.push(session_id, _unpacked(service, header, payload))))


@rpc.functions.async_execution
def leave(session_id: str) -> Future[None]:
    """End a membership."""
    future = Future[None]()

    def call() -> None:
        published().local_value().leave(session_id)
        future.set_result(None)

    _dispatcher().submit(call)
    return future


def _unpacked(service: Service, header: bytes, payload: Tensor) -> Push:
    if type(header) is not bytes or len(header) != PUSH.size:
        raise PushRefused(f"push: header: expected {PUSH.size} bytes; worker and server must have the same version")
    grad, buffers = service.push_format.unpack(payload)
    return Push(**PUSH.unpack(header), grad=grad, buffers=buffers)


def _dispatched(call: Callable[[], ReplyFuture]) -> Future[Response]:
    """Make a call in a thread that is not confined; the future of torch's RPC has its reply."""
    future = Future[Response]()

    def run() -> None:
        call().add_done_callback(lambda done: future.set_result(_packed(done.value())))

    _dispatcher().submit(run)
    return future


@functools.cache
def _dispatcher() -> Dispatcher:
    """The threads of this process that make the calls."""
    return Dispatcher()


def _packed(response: ServerResponse) -> Response:
    if isinstance(response, ErrorReply):
        return pack_error(response), None
    if response.ticket is None:
        return REPLY.pack(response), torch.empty(0)
    return REPLY.pack(response) + response.buffers.numpy().tobytes(), response.params


_service: rpc.RRef[Service] | None = None


def publish(service: Service) -> None:
    """Make the service known to workers that ask this process for it."""
    global _service  # a function that is called by name from another process has no other way to find it
    _service = rpc.RRef(service)


def published() -> rpc.RRef[Service]:
    """The RRef of this process's service; called by workers."""
    assert _service is not None, "the service is published before a worker gets its address"
    return _service


CALLED_BY_WORKERS = (register, push, leave, published)
"""The functions that a peer may call in the server's process."""


class TorchRpcServerSide(ServerSide):
    """Starts the server's agent, and publishes the service.

    Args:
        num_workers: Workers to have threads for. A handler waits for the service's lock only, never for another one.
        timeout_seconds: For the agent's own calls.
    """

    def __init__(self, *, num_workers: int, timeout_seconds: float) -> None:
        self.threads = max(DEFAULT_THREADS, num_workers + 4)
        self.timeout_seconds = timeout_seconds
        self._agent = contextlib.ExitStack()

    @override
    def start(self, service: Service) -> Mapping[str, Any]:
        _dispatcher()  # its threads are not confined, since they start before the agent
        agent = rpc_agent(
            SERVER,
            host=interface_address(os.environ["TP_SOCKET_IFNAME"]) if "TP_SOCKET_IFNAME" in os.environ else "127.0.0.1",
            server=None,
            timeout_seconds=self.timeout_seconds,
            threads=self.threads,
            functions=CALLED_BY_WORKERS,
        )
        address = self._agent.enter_context(agent)
        publish(service)
        return {"agent": address}

    @override
    def close(self) -> None:
        self._agent.close()
