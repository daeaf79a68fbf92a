"""Both ends of a connection, and what a server offers to workers, for tests of the control plane and of what is built on it."""

from __future__ import annotations

import os
import socket
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from ormo_rpc.control.messages import JoinRequest
from ormo_rpc.rendezvous.secret import Secret
from ormo_rpc.runtimes.distributed.server_process.serving import Serving
from ormo_rpc.runtimes.distributed.worker_process.context import WorkerArgs
from tests.support.processes import PATIENCE_SECONDS


def serving(
    transport: str = "auto",
    *,
    control: str = "socket",
    config: str = "",
    fingerprint: Mapping[str, Any] | None = None,
    heartbeat_seconds: float = 1.0,
    timeout_seconds: float = PATIENCE_SECONDS,
    call_timeout_seconds: float = PATIENCE_SECONDS,
) -> Serving:
    """Things that are served; without an agent, so that server and workers may be in one process."""
    return Serving(
        transport=transport,
        control=control,
        config=config,
        fingerprint=fingerprint or {},
        heartbeat_seconds=heartbeat_seconds,
        worker_timeout_seconds=timeout_seconds,
        call_timeout_seconds=call_timeout_seconds,
    )


def join_request(preferred_worker: int | None = None, slot_id: str = "") -> JoinRequest:
    """The request of this process."""
    return JoinRequest(preferred_worker=preferred_worker, pid=os.getpid(), host=socket.gethostname(), slot_id=slot_id)


def worker_args(address: tuple[str, int], secret: Secret) -> WorkerArgs:
    """Those of a worker that its launcher has started as number 0, and that reports to nobody."""
    return WorkerArgs(
        address=address,
        secret=secret,
        preferred_worker=0,
        slot_id="here",
        restart_count=0,
        data_root=None,
        timeout_seconds=PATIENCE_SECONDS,
        on_joined=lambda: None,
        report=lambda _: None,
    )


@contextmanager
def connected_sockets() -> Generator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection."""
    near, far = socket.socketpair()
    with near, far:
        yield near, far


@contextmanager
def silent_port() -> Generator[tuple[str, int]]:
    """A port that does not answer, like one behind a firewall: the queue of its listener is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        waiting: list[socket.socket] = []
        try:
            while True:
                waiting.append(socket.create_connection(listener.getsockname(), 0.1))
        except TimeoutError:
            yield listener.getsockname()
        finally:
            for each in waiting:
                each.close()
