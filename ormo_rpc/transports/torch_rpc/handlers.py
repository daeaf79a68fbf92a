"""The service as workers reach it through torch.distributed.rpc, by an RRef (``wire.transport=uv``).

Each handler returns at once, with a Future where the answer is still to come.
"""

from __future__ import annotations

import torch.distributed.rpc as rpc
from torch import Tensor
from torch.futures import Future

from ormo_rpc.runtimes.distributed.server_process.service import Service
from ormo_rpc.transports.pending_replies import ReplyFuture, ServerResponse, answered


@rpc.functions.async_execution
def register(session_id: str) -> Future[ServerResponse]:
    """Say that a worker is ready; see `Service.register`."""
    return _future(answered(lambda: published().local_value().register(session_id)))


@rpc.functions.async_execution
def push(
    session_id: str, ticket: int, stamp: int, incarnation: int, loss: float | None, samples: int, payload: Tensor
) -> Future[ServerResponse]:
    """Deliver the gradient of a ticket; see `Service.receive`."""
    return _future(
        answered(lambda: published().local_value().receive(session_id, ticket, stamp, incarnation, loss, samples, payload))
    )


def _future(pending: ReplyFuture) -> Future[ServerResponse]:
    """The same future as torch's RPC wants it."""
    future = Future[ServerResponse]()
    pending.add_done_callback(lambda done: future.set_result(done.value()))
    return future


def leave(session_id: str) -> None:
    """Say that a worker that was told to stop is leaving; see `Service.leave`."""
    published().local_value().leave(session_id)


_service: rpc.RRef[Service] | None = None


def publish(service: Service) -> None:
    """Make the service known to workers that ask this process for it."""
    global _service  # a function that is called by name from another process has no other way to find it
    _service = rpc.RRef(service)


def published() -> rpc.RRef[Service]:
    """The RRef of this process's service; called by workers."""
    assert _service is not None, "the service is published before any worker is let in"
    return _service


CALLED_BY_WORKERS = (register, push, leave, published)
"""All that a peer may call in the server's process."""
