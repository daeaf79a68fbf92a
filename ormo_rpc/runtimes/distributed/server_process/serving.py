"""All that workers reach: the listener, the control plane with its agent, and the server's half of the transport."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ormo_rpc.control.base import ControlHandler
from ormo_rpc.control.dispatch import Dispatcher
from ormo_rpc.control.memberships import Membership
from ormo_rpc.control.messages import JoinResponse
from ormo_rpc.control.server import ControlServer
from ormo_rpc.rendezvous.listener import Listener
from ormo_rpc.rendezvous.protocol import Admission
from ormo_rpc.rendezvous.secret import Secret
from ormo_rpc.transports.base import ServerSide, Service

_log = logging.getLogger(__name__)
Answer = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Answers a request; both are of JSON's types."""


class ServedService(Service, ControlHandler, Protocol):
    """The service, as the data paths and the control plane see it."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """The things that are served.

    Attributes:
        transport: The name of the transport.
        control: The carrier of the control plane: ``rpc`` or ``socket``.
        config: The configuration of the run, as YAML.
        fingerprint: Of the server's model and data set.
        heartbeat_seconds: The interval of each worker's heartbeats.
        worker_timeout_seconds: Silence after which each side takes the other one for dead.
        call_timeout_seconds: For a call of the control plane.
        answers: What answers the requests of workers that are to no transport, by the name that they give in its place.
    """

    transport: str
    control: str
    config: str
    fingerprint: Mapping[str, Any]
    heartbeat_seconds: float
    worker_timeout_seconds: float
    call_timeout_seconds: float
    answers: Mapping[str, Answer] = field(default_factory=dict[str, Answer])


@contextlib.contextmanager
def served(
    sock: socket.socket, secret: Secret, service: ServedService, side: ServerSide, serving: Serving
) -> Generator[Listener]:
    """Serve workers until the context ends.

    Args:
        sock: The listening socket; it stays open.
        secret: Of the run.
        service: The service.
        side: The server's half of the transport.
        serving: Everything else.
    """
    dispatcher = Dispatcher()
    offer = side.start(service)
    halves = {serving.transport: side, **side.parts}
    offers = {
        name: offer if half is side else offer[name]
        for name, half in halves.items()
        if serving.control == "rpc" or not half.functions or half is side
    }

    def respond(membership: Membership) -> JoinResponse:
        return JoinResponse(
            worker=membership.worker,
            session_id=membership.session_id,
            config=serving.config,
            offers=offers,
            fingerprint=serving.fingerprint,
        )

    def answer(session_id: str, transport: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
        if transport in serving.answers:
            return serving.answers[transport](request)
        return halves.get(transport, side).answer(session_id, request)

    with contextlib.ExitStack() as stack:
        stack.callback(dispatcher.close)
        stack.callback(side.close)
        admission = Admission(
            admission_id="",
            control=serving.control,
            agent=None,
            heartbeat_seconds=serving.heartbeat_seconds,
            timeout_seconds=serving.worker_timeout_seconds,
            call_timeout_seconds=serving.call_timeout_seconds,
        )
        control = ControlServer(service, respond, answer, admission, dispatcher)
        if serving.control == "rpc":
            stack.enter_context(_agent(control, service, side, str(sock.getsockname()[0])))
        yield stack.enter_context(Listener(sock, secret, control, serving.worker_timeout_seconds, side.accept))


@contextlib.contextmanager
def _agent(control: ControlServer, service: Service, side: ServerSide, host: str) -> Generator[None]:
    """Run this process's agent of torch.distributed.rpc, and publish the RRef of the server."""
    from ormo_rpc.control.torch_rpc import server
    from ormo_rpc.control.torch_rpc.listening import ServersAgent

    functions = (*server.CALLED_BY_WORKERS, *side.functions)
    published = server.Published(control, service, control.dispatcher)
    with ServersAgent(published, functions, host=host, timeout_seconds=control.admission.call_timeout_seconds) as agent:
        control.agent = agent.address
        yield
