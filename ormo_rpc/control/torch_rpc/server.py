"""The functions that workers call in the server's process by torch.distributed.rpc; each finds the service by its RRef.

They run in the agent's own threads, which are confined, and do nothing there but hand the work to a dispatcher.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed.rpc as rpc
from torch.futures import Future
from typing_extensions import override

from ormo_rpc.control.dispatch import Dispatcher
from ormo_rpc.control.messages import pack_error, pack_result
from ormo_rpc.control.server import ControlServer


@dataclass(frozen=True)
class Published:
    """The server's objects that the RRef refers to; they do not leave the process, as by `rpc.RRef.to_here`.

    Attributes:
        control: Makes the calls of the control plane.
        service: The service, for transports that are called by torch.distributed.rpc.
        dispatcher: Does the work.
    """

    control: ControlServer
    service: Any
    dispatcher: Dispatcher

    @override
    def __reduce__(self) -> NoReturn:
        raise pickle.PicklingError("the server's objects stay in its process")


_published: rpc.RRef[Published] | None = None


def publish(server: Published) -> None:
    """Make the server known to workers that ask this process for it."""
    global _published  # a function that is called by name from another process has no other way to find it
    _published = rpc.RRef(server)


def published() -> rpc.RRef[Published]:
    """The RRef of this process's server; called by workers, which also learn from it that the server answers."""
    assert _published is not None, "the server is published before a worker gets its address"
    return _published


@rpc.functions.async_execution
def join(arguments: str) -> Future[str]:
    """Make the caller a member of the run (`Control.join`)."""
    return _dispatched("join", arguments)


@rpc.functions.async_execution
def ask(arguments: str) -> Future[str]:
    """Answer a request to a transport (`Control.ask`)."""
    return _dispatched("ask", arguments)


@rpc.functions.async_execution
def request_leave(arguments: str) -> Future[str]:
    """Let the caller leave after its ticket (`Control.request_leave`)."""
    return _dispatched("request_leave", arguments)


@rpc.functions.async_execution
def leave(arguments: str) -> Future[str]:
    """End the caller's membership (`Control.leave`)."""
    return _dispatched("leave", arguments)


@rpc.functions.async_execution
def present_state(admission_id: str) -> Future[tuple[str, torch.Tensor, torch.Tensor]]:
    """The parameters as they are, for a process that evaluates them beside the run (`RpcControl.present_state`)."""
    server = published().local_value()
    future = Future[tuple[str, torch.Tensor, torch.Tensor]]()

    def work() -> None:
        try:
            server.control.check_admission(admission_id)
            iteration, params, buffers = server.service.present_state()
            future.set_result((pack_result({"iteration": iteration}), params, buffers))
        except Exception as error:
            future.set_result((pack_error(error), torch.empty(0), torch.empty(0)))

    server.dispatcher.submit(work)
    return future


def _dispatched(name: str, arguments: str) -> Future[str]:
    server = published().local_value()
    future = Future[str]()
    server.dispatcher.submit(lambda: future.set_result(server.control.call(name, arguments)), may_wait=True)
    return future


FUNCTIONS: Mapping[str, Callable[[str], Future[str]]] = {
    "join": join,
    "ask": ask,
    "request_leave": request_leave,
    "leave": leave,
}
"""The functions by the name of the call."""
CALLED_BY_WORKERS: tuple[Callable[..., Any], ...] = (published, present_state, *FUNCTIONS.values())
"""The functions of the control plane that a peer may call in the server's process."""
