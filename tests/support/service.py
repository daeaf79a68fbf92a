"""The service of a server's process, called directly: joining, registering and pushing without a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ormo_rpc import build_server
from ormo_rpc.control.memberships import Membership
from ormo_rpc.control.messages import JoinRequest
from ormo_rpc.errors import BY_NAME
from ormo_rpc.messages import ErrorReply, Push, Reply
from ormo_rpc.runtimes.distributed.server_process.service import Service
from ormo_rpc.server.parameter_server import ParameterServer
from tests.support.buffers import averages

DIMENSION = 4
MANY = 24  # an RPC agent has 16 threads by default


class ServerResponse:
    """A future as the worker sees it: an error reply is raised."""

    def __init__(self, future: Any) -> None:
        self.future = future

    def done(self) -> bool:
        """Tell whether it is completed."""
        return self.future.done()

    def value(self) -> Reply:
        """The reply that it is completed with; an error where it is not completed."""
        return self._received(self.future.value())

    def wait(self) -> Reply:
        """Wait for its value."""
        return self._received(self.future.wait())

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Call back when it is completed, in the thread that does so."""
        self.future.add_done_callback(callback)

    @staticmethod
    def _received(result: Any) -> Reply:
        if isinstance(result, ErrorReply):
            raise BY_NAME[result.error](result.text)
        return result


class Owner:
    """The service, as the listener and the transports call it."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.memberships: dict[int, Membership] = {}

    def join(self, worker: int | None, slot: str = "") -> Membership:
        """Let a process join."""
        request = JoinRequest(preferred_worker=worker, pid=1000 + (worker or 0), host="here", slot_id=slot)
        membership = self.service.join(request)
        self.memberships[membership.worker] = membership
        return membership

    def register(self, worker: int) -> ServerResponse:
        """Let a worker join, and register it."""
        return self.register_session(self.join(worker).session_id)

    def register_session(self, session_id: str) -> ServerResponse:
        """Register the worker of a session."""
        return ServerResponse(self.service.register(session_id))

    def push(self, reply: Reply, payload: Tensor | None = None, *, session_id: str | None = None) -> ServerResponse:
        """Push for a reply."""
        assert reply.ticket is not None
        form = self.service.push_format
        payload = gradient(reply.ticket) if payload is None else payload
        grad, buffers = form.unpack(payload.view(torch.uint8))
        push = Push(
            worker=reply.worker,
            ticket=reply.ticket,
            stamp=reply.stamp,
            grad=grad,
            loss=0.5,
            samples=8,
            buffers=buffers,
            incarnation=reply.incarnation,
            loss_scale=reply.loss_scale,
        )
        answer = self.service.push(session_id or self.memberships[reply.worker].session_id, push)
        return ServerResponse(answer)


def gradient(ticket: int) -> Tensor:
    """A gradient of integers, so that float64 adds them exactly and in any order."""
    return torch.tensor([1.0, ticket, -ticket, ticket % 7], dtype=torch.float64)


def total(count: int) -> Tensor:
    return torch.stack([gradient(ticket) for ticket in range(count)]).sum(0)


def owner(
    num_workers: int, *, observe: Callable[[ParameterServer], None] = lambda _: None, buffers: int = 0, **options: Any
) -> Owner:
    given: dict[str, Any] = {"algorithm": "asgd", "lr": 1.0, "params": torch.zeros(DIMENSION, dtype=torch.float64), **options}
    if buffers:
        given["buffers"] = averages({"mean": torch.zeros(buffers, dtype=torch.float64)}, {"mean": 1.0})
    return Owner(Service(build_server(num_workers=num_workers, **given), observe))


def begun(there: Owner) -> list[Reply]:
    """The first replies, one per worker."""
    return [answer.value() for answer in [there.register(worker) for worker in range(there.service.server.num_workers)]]


class Clock:
    """A substitute for the module `time`."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        """The time that was set."""
        return self.now

    monotonic = perf_counter
