"""Both ends of a connection, and the answer to workers that join, for tests of the rendezvous and of what is built on it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

from ormo_rpc.rendezvous.memberships import Membership
from ormo_rpc.rendezvous.protocol import JoinResponse
from tests.support.processes import PATIENCE_SECONDS


def join_response(
    config: str = "",
    *,
    transport: Mapping[str, Any] | None = None,
    fingerprint: Mapping[str, Any] | None = None,
    heartbeat_seconds: float = 1.0,
    timeout_seconds: float = PATIENCE_SECONDS,
) -> Callable[[Membership], JoinResponse]:
    """Return a function that makes the response to a worker that has joined, for `Listener`."""
    return lambda membership: JoinResponse(
        worker=membership.worker,
        session_id=membership.session_id,
        config=config,
        transport=transport or {},
        fingerprint=fingerprint or {},
        heartbeat_seconds=heartbeat_seconds,
        timeout_seconds=timeout_seconds,
    )


@contextmanager
def connected_sockets() -> Generator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection."""
    near, far = socket.socketpair()
    with near, far:
        yield near, far
