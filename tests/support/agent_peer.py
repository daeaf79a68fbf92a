"""A worker's process over torch.distributed.rpc, for tests of the control plane.

It joins a server, and says something about each membership. Its agent has the same number as that of every other such process.
The modes:

* ``rejoin``: it ends the membership when it is told an address, and joins there as another worker;
* ``together``: two loops of one process join; when it is told another address, a third one joins there while they hold on;
* ``timeout``: it asks for something that the server does not answer, and says what came of it, and after how many seconds;
* ``cut``: the connection between the agents is lost while a loop is a member, and another one joins;
* ``admission``, ``join``, ``ask``, ``register``: kill this process right after it.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import socket
import time
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed.rpc as rpc

from ormo_rpc.control.joining import Joined, joined
from ormo_rpc.control.torch_rpc import agent
from ormo_rpc.control.torch_rpc.client import RpcControl
from ormo_rpc.control.torch_rpc.server import published
from ormo_rpc.errors import ServerLost
from ormo_rpc.options import parts
from ormo_rpc.rendezvous.addresses import parse_address
from ormo_rpc.rendezvous.lease import connect
from ormo_rpc.rendezvous.secret import Secret
from ormo_rpc.transports.base import Endpoint
from tests.support.processes import PATIENCE_SECONDS
from tests.support.rendezvous import join_request
from tests.support.transport_peers import SECRET_TEXT

SECRET = Secret(SECRET_TEXT)
NUMBER = 7
"""Of each agent."""
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.transport_peers", "tests.support.agent_peer"])


class Peer:
    """The process, as a test sees it; a context, whose end kills it.

    Args:
        mode: See above.
        address: HOST:PORT of the server.
    """

    def __init__(self, mode: str, address: str) -> None:
        self._pipe, child_end = _context.Pipe()
        self.process = _context.Process(target=_main, args=(child_end, mode, address), daemon=True)
        self.process.start()
        child_end.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()
        self._pipe.close()

    def says(self) -> Any:
        """Wait for what it says next."""
        assert self._pipe.poll(PATIENCE_SECONDS), "it says nothing"
        return self._pipe.recv()

    def tell(self, address: str) -> None:
        """Tell it an address; an empty one lets it end."""
        self._pipe.send(address)


def _main(pipe: Connection, mode: str, address: str) -> None:
    agent._number = lambda _: NUMBER  # pyright: ignore[reportPrivateUsage] # chance would have two processes draw the same
    torch.set_num_threads(1)
    if mode == "rejoin":
        for number in itertools.count():
            if not address:
                break
            with _join(address, number) as membership:
                pipe.send(_described(membership))
                address = pipe.recv()
    elif mode == "timeout":
        with _join(address, 0) as membership:
            began = time.monotonic()
            try:
                membership.control.ask(membership.response.session_id, "rpc", {"wait": True})
            except ServerLost as error:
                pipe.send((type(error).__name__, str(error), time.monotonic() - began))
    elif mode == "together":
        _together(pipe, address)
    elif mode == "cut":
        _cut(pipe, address)
    else:
        _die(pipe, mode, address)
    os._exit(0)


def _described(membership: Joined) -> dict[str, Any]:
    """The server and the agent, as this process sees them."""
    assert isinstance(membership.control, RpcControl)
    rref = membership.control.server
    again = rpc.rpc_sync(rref.owner(), published)
    info = rpc.get_worker_info()
    return {
        "worker": membership.response.worker,
        "is_owner": rref.is_owner(),
        "owner": rref.owner_name(),
        "owner_of_the_second": again.owner_name(),
        "agent": info.name,
        "number": info.id,
        "answer": membership.control.ask(membership.response.session_id, "rpc", {"connected": True}),
    }


def _join(address: str, number: int) -> contextlib.AbstractContextManager[Joined]:
    return joined(parse_address(address), SECRET, join_request(number), timeout_seconds=PATIENCE_SECONDS)


def _together(pipe: Connection, address: str) -> None:
    with _join(address, 0) as first, _join(address, 1) as second:
        pipe.send([_described(first), _described(second)])
        with _join(pipe.recv(), 2) as third:
            pipe.send(_described(third))
            try:
                first.control.ask(first.response.session_id, "rpc", {"connected": True})
            except Exception as error:
                pipe.send(type(error).__name__)
            pipe.send(_described(third))
            pipe.recv()


def _cut(pipe: Connection, address: str) -> None:
    with _join(address, 0) as first:
        _shut_connections(str(first.lease.admission.agent))
        with _join(address, 1) as second:
            pipe.send(_described(second))
            pipe.send(_described(first))
            pipe.recv()


def _shut_connections(agent_address: str) -> None:
    """Shut this process's connections to an agent down."""
    peer = parse_address(agent_address.removeprefix("uv://"))
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names are enough
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as connection:
            if connection.getpeername()[:2] == peer:
                connection.shutdown(socket.SHUT_RDWR)


def _die(pipe: Connection, place: str, address: str) -> None:
    def die() -> None:
        pipe.send("dies")
        os.kill(os.getpid(), signal.SIGKILL)

    if place == "admission":
        with connect(parse_address(address), SECRET, timeout_seconds=PATIENCE_SECONDS):
            die()
    with _join(address, 0) as membership:
        if place == "join":
            die()
        transport = parts("transport")["rpc"]()
        side = transport.worker_side()
        endpoint = Endpoint(
            lease=membership.lease,
            control=membership.control,
            joined=membership.response,
            transport="rpc",
            secret=SECRET,
            timeout_seconds=PATIENCE_SECONDS,
        )
        with side.connect(endpoint, torch.zeros(20, dtype=torch.uint8)) as client:
            if place == "ask":
                die()
            with contextlib.suppress(ServerLost):
                client.register()
            die()
