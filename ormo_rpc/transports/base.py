"""The contract of a transport, the data path of one worker: how its pushes and their replies cross to the server's process.

A transport is a `Part` with two halves, made from the same options in both processes::

    server's process                                      worker's process
    side = transport.server_side(...)                     side = transport.worker_side()
    offer = side.start(service)       -- join response -> side.connect(Endpoint(offer=offer, ...), payload)
    side.answer(session_id, request)  <-- control plane-- endpoint.ask(request), such as to open a pair or for a refusal's text
    side.accept(reader)               <-- a connection -- endpoint.open_connection(), where the transport wants one
    service.connected(session_id, ..) the path is open
    service.push(session_id, push)    <--- push --------- client.push(push)
    ReplyFuture                       ---- reply -------> Reply

Joining and leaving are the business of `control`, authentication and the lease that of `rendezvous`, the same for every
transport.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from ormo_rpc.compression.format import PushFormat
from ormo_rpc.control.base import Control
from ormo_rpc.control.messages import JoinResponse
from ormo_rpc.errors import Refused
from ormo_rpc.kernels.page_locked import zeros
from ormo_rpc.kernels.pool import Memory
from ormo_rpc.messages import Push, Reply
from ormo_rpc.options.part import Part
from ormo_rpc.rendezvous.connecting import open_connection
from ormo_rpc.rendezvous.lease import Lease
from ormo_rpc.rendezvous.protocol import LineReader, authenticate_server
from ormo_rpc.rendezvous.secret import Secret
from ormo_rpc.transports.pending_replies import ReplyFuture

MAX_REASON_CHARACTERS = 300
"""A longer reason for a transport is cut."""


class Transport(Part, ABC):
    """A way for pushes and replies, with its options as fields; the same object configures both halves.

    Attributes:
        NEEDS_RPC: It needs an agent of torch.distributed.rpc (``runtime.control=rpc``).
        AVOIDS_RPC: It is for networks that one does not trust, so that ``runtime.control=auto`` goes without an agent.
        BETWEEN_GPUS: Worker and server have to be on GPUs.
    """

    PATH = "transport"
    NEEDS_RPC: ClassVar[bool] = False
    AVOIDS_RPC: ClassVar[bool] = False
    BETWEEN_GPUS: ClassVar[bool] = False

    @classmethod
    def unavailable(cls) -> str:
        """Return the reason why this machine cannot use it, such as what torch was built without; empty where it can."""
        return ""

    @abstractmethod
    def server_side(self) -> ServerSide:
        """Make the server's half."""

    @abstractmethod
    def worker_side(self) -> WorkerSide:
        """Make the half of one worker, which is kept as long as the worker, across incarnations of the server."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplySize:
    """The most that a reply carries, in bytes: some transports receive into memory of a fixed size.

    Attributes:
        params: Of the vectors that the algorithm sends.
        buffers: Of the model's buffers.
    """

    params: int
    buffers: int


class Service(Protocol):
    """The server as a transport sees it; every method may be called from any thread.

    Attributes:
        push_format: The wire form of pushes.
        reply_size: The most that a reply carries.
        rereads_pushes: Whether a push is read again after it was validated. Its memory must then be out of the worker's reach.
        device: The device of the server's parameters. Pushes may lie there or on the CPU; replies lie there.
    """

    push_format: PushFormat
    reply_size: ReplySize
    rereads_pushes: bool
    device: torch.device

    def is_member(self, session_id: str) -> bool:
        """Tell whether a session is valid; it stays so until the worker leaves or is evicted."""
        ...

    def connected(self, session_id: str, transport: str, reason: str) -> None:
        """Take note of the transport that carries a worker's pushes from now on, and of the reason why it is that one."""
        ...

    def register(self, session_id: str) -> ReplyFuture:
        """Make a worker that has joined available for work; the future is its first reply.

        Raises:
            PushRefused: the session is not valid.
        """
        ...

    def push(self, session_id: str, push: Push) -> ReplyFuture:
        """Apply a push; the future is the sender's next reply. It stays open where the server itself fails.

        The tensors of the push must not change before the call returns.

        Raises:
            PushRefused: the push is refused, and nothing has changed.
        """
        ...

    def on_host(self, reply: Reply) -> Reply:
        """Return a reply with its tensors on the CPU, for what cannot send those of a GPU."""
        ...

    def leave(self, session_id: str) -> None:
        """End a membership, as its worker asks."""
        ...


class ServerSide:
    """The server's half of a transport."""

    memory: Callable[[int], Memory] | None = None
    """Makes the memory of the parameters that are sent, given its bytes; None for the kernel's own."""
    functions: Sequence[Callable[..., Any]] = ()
    """The functions that a worker may call in the server's process by torch.distributed.rpc."""
    parts: Mapping[str, ServerSide] = {}
    """The halves of other transports of which this one consists, by name; a worker may use each of them by itself."""

    _service: Service | None = None

    @property
    def service(self) -> Service:
        """The service, once `start` has been called."""
        assert self._service is not None, "started before any worker is served"
        return self._service

    def start(self, service: Service) -> Mapping[str, Any]:
        """Serve from now on; return the values that workers need to connect (`Endpoint.offer`), of JSON's types.

        By default there are none. A half that consists of others returns the value of each under its name.
        """
        self._service = service
        return {}

    def answer(self, session_id: str, request: Mapping[str, Any]) -> Mapping[str, Any]:  # noqa: ARG002 - for those that are asked
        """Answer a request that a worker made by `Endpoint.ask`; both are of JSON's types. It may block for a moment.

        Raises:
            ValueError: the request is wrong; the worker is sent the message.
        """
        raise ValueError("transport: this run's transport answers no requests")

    def accept(self, reader: LineReader) -> None:  # noqa: ARG002 - for those that take connections
        """Serve a connection that a worker opened by `Endpoint.open_connection`, in the calling thread, until it ends.

        Raises:
            ValueError: the worker's request is wrong; it is sent the message.
            OSError, EOFError, WireError: the connection has ended, or the worker violates the protocol.
        """
        raise ValueError("transport: this run's transport takes no connections of its own")

    def session_ended(self, session_id: str) -> None:
        """Take note that a membership has ended, after its last reply was given; called without a lock, and not to block."""

    def close(self) -> None:
        """Serve no longer."""


class WorkerSide(ABC):
    """A worker's half of a transport.

    Attributes:
        page_locked: A GPU writes pushes and reads parameters: their memory is page-locked. To be set before anything else.
        gpu: The GPU of the model, where the server has its parameters on one as well: pushes may then stay on GPUs. None
            otherwise. To be set before anything else.
    """

    page_locked: bool = False
    gpu: torch.device | None = None

    def allocate(self, size: int) -> torch.Tensor:
        """Make the memory of the worker's pushes: ``size`` zero bytes (uint8), at an address that is a multiple of 64."""
        return zeros(size, page_locked=self.page_locked)

    @abstractmethod
    def connect(self, endpoint: Endpoint, payload: torch.Tensor) -> AbstractContextManager[ServerClient]:
        """Connect to one incarnation of the server, until the context ends.

        Args:
            endpoint: The server, and this worker's membership.
            payload: The wire form of every push, bytes of shape (`PushFormat.size`,), in memory that `allocate` made.

        Raises:
            ServerLost: the server cannot be reached.
            WireError: server and worker cannot use this transport between them.
        """


class ServerClient(Protocol):
    """The server as a worker sees it."""

    def register(self) -> Reply:
        """Become available for work, and wait for the first reply.

        Raises:
            ServerLost: the connection is lost, or the server has ended.
            PushRefused: it refuses this worker.
        """
        ...

    def push(self, push: Push) -> Reply:
        """Deliver a push, whose tensors lie in the payload, and wait for the reply; the next call may overwrite its parameters.

        Raises:
            ServerLost: the connection is lost, or the server has ended.
            PushRefused: it refuses the push.
        """
        ...

    def leave(self) -> None:
        """Leave; a lost server is no error."""
        ...


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """The server as known to a worker that has joined.

    Attributes:
        lease: Held for as long as the membership lasts.
        control: The calls of the control plane.
        joined: The server's answer to joining.
        transport: The name of the transport that uses this.
        secret: Of the run.
        timeout_seconds: For one exchange of messages, ``runtime.rpc_timeout_seconds``.
        reason: The reason for this transport; by default it was asked for.
        chosen: Called with transport and reason by one that has chosen another one.
    """

    lease: Lease
    control: Control
    joined: JoinResponse
    transport: str
    secret: Secret
    timeout_seconds: float
    reason: str = "asked for"
    chosen: Callable[[str, str], None] = lambda *_: None

    @property
    def worker(self) -> int:
        """This worker's number."""
        return self.joined.worker

    @property
    def session_id(self) -> str:
        """Identifies the membership in every call."""
        return self.joined.session_id

    @property
    def offer(self) -> Mapping[str, Any]:
        """The value that `ServerSide.start` returned.

        Raises:
            Refused: the server does not serve this transport.
        """
        offers = self.joined.offers
        if self.transport not in offers:
            raise Refused(
                f"transport: got {self.transport}, which this server does not serve, expected one of {', '.join(offers)}"
            )
        return offers[self.transport]

    @property
    def local_host(self) -> str:
        """This machine's address on the connection of the lease, at which whatever listens for the server is to be bound."""
        return self.lease.local_host

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the server's listener."""
        host, port = self.lease.connection.getpeername()[:2]
        return host, port

    def alive(self) -> bool:
        """Tell whether the lease holds; without it there is no server to wait for."""
        return not self.lease.lost.is_set()

    def ask(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Ask the server's half of this transport (`ServerSide.answer`); both values are of JSON's types.

        Raises:
            ServerLost: it has not answered in time, or cannot be reached.
            StaleSession: this worker was evicted.
            Refused: it refuses, with its reason.
        """
        return self.control.ask(self.session_id, self.transport, request)

    def open_connection(self) -> LineReader:
        """Open an authenticated connection, which `ServerSide.accept` serves; to be closed by the caller.

        Raises:
            OSError, EOFError: the server cannot be reached.
            WireError: it does not know the secret.
        """
        connection = open_connection(self.address, self.timeout_seconds)
        try:
            reader = LineReader(connection)
            authenticate_server(reader, self.secret, {"stream": True}, self.timeout_seconds)
        except BaseException:
            connection.close()
            raise
        return reader
