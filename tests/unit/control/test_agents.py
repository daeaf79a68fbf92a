"""The control plane over torch.distributed.rpc: a server in this process, and workers in processes of their own."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import forkserver
from typing import Any

import pytest
from typing_extensions import override

from ormo_rpc.control.torch_rpc.agent import agent_address
from ormo_rpc.rendezvous.addresses import parse_address, written
from ormo_rpc.rendezvous.connecting import listens
from ormo_rpc.rendezvous.lease import connect
from ormo_rpc.rendezvous.secret import Secret
from ormo_rpc.runtimes.distributed.server_process.serving import served
from ormo_rpc.transports.rpc.server import TorchRpcServerSide
from tests.support.agent_peer import NUMBER, Peer
from tests.support.processes import PATIENCE_SECONDS, wait_until
from tests.support.rendezvous import serving
from tests.support.transport_peers import SECRET_TEXT, RecordingService

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


@pytest.fixture(autouse=True, scope="module")
def _forkserver() -> None:  # pyright: ignore[reportUnusedFunction] # a fixture
    """Start the process that peers are forked from, which outlives each test."""
    forkserver.ensure_running()


class Side(TorchRpcServerSide):
    """Answers one kind of request when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.released = threading.Event()

    @override
    def answer(self, session_id: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
        if "wait" in request:
            assert self.released.wait(PATIENCE_SECONDS)
        return super().answer(session_id, request)


@contextmanager
def server(
    service: RecordingService | None = None, side: Side | None = None, call_timeout_seconds: float = PATIENCE_SECONDS
) -> Generator[str]:
    """A server with an agent; the value is its address."""
    side = side or Side()
    what = serving("rpc", control="rpc", call_timeout_seconds=call_timeout_seconds)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        with served(sock, Secret(SECRET_TEXT), service or RecordingService(3), side, what):
            yield f"127.0.0.1:{sock.getsockname()[1]}"
        sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts


def test_a_worker_sees_an_rref_that_the_server_owns_and_peers_of_one_number_do_not_disturb_it() -> None:
    """Replies go back through the connection that a call came by, and the server itself numbers the forks of its RRef."""
    with ExitStack() as stack:
        service = RecordingService(3)
        address = stack.enter_context(server(service))
        peers = [stack.enter_context(Peer("rejoin", address)) for _ in range(3)]
        seen = [peer.says() for peer in peers]
        assert sorted(each["worker"] for each in seen) == [0, 8, 9]
        for each in seen:
            del each["worker"]
            assert each == {
                "is_owner": False,
                "owner": "server",
                "owner_of_the_second": "server",
                "agent": "worker",
                "number": NUMBER,
                "answer": {},
            }
        peers[0].process.kill()  # its forks of the RRef are never given back
        wait_until(lambda: len(service.memberships) == 2, "the end of the membership")
        for peer in (peers[1], peers[2], peers[1]):
            peer.tell(address)  # its agent ends, and it joins again
            assert peer.says()["owner"] == "server"
        assert len(service.memberships) == 2


def closed_by_a_scan(agent: tuple[str, int]) -> bool:
    """Make a connection that ends at once, which the agent may or may not accept before; tell if its port is closed by now."""
    with suppress(ConnectionError), socket.create_connection(agent) as scan:
        scan.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # so that it ends by a reset
    return not listens(agent)


def test_a_connection_to_the_agent_that_ends_at_once_keeps_nobody_out(caplog: pytest.LogCaptureFixture) -> None:
    """As a port scanner makes it, or a worker that dies at that moment: torch's agent then closes its port for good."""
    service = RecordingService(3)
    with server(service) as address, Peer("rejoin", address) as first, Peer("rejoin", address) as second:
        assert first.says()["owner"] == second.says()["owner"] == "server"
        with connect(parse_address(address), Secret(SECRET_TEXT), timeout_seconds=PATIENCE_SECONDS) as lease:
            agent = agent_address(str(lease.admission.agent))
        wait_until(lambda: closed_by_a_scan(agent), "the end of its port")
        first.tell(address)  # whose agent has a connection still
        assert first.says()["answer"] == {}
        second.tell(address)
        assert second.says()["answer"] == {}
        assert len(service.memberships) == 2
    (warning,) = caplog.messages
    assert f"the agent of torch.distributed.rpc at {written(*agent)} has ceased to listen" in warning


def test_a_process_joins_servers_one_after_the_other_as_another_worker_each_time() -> None:
    with ExitStack() as stack:
        with server() as address:
            peer = stack.enter_context(Peer("rejoin", address))
            first = peer.says()
        with server() as address:
            peer.tell(address)
            second = peer.says()
            peer.tell(address)
            third = peer.says()
            assert [each["worker"] for each in (first, second, third)] == [0, 1, 2]
            assert {each["number"] for each in (first, second, third)} == {NUMBER}
            peer.tell("")
            peer.process.join(PATIENCE_SECONDS)
            assert peer.process.exitcode == 0


def test_the_loops_of_a_process_share_one_agent_which_starts_again_for_another_server() -> None:
    with ExitStack() as stack:
        with server() as address:
            peer = stack.enter_context(Peer("together", address))
            assert [each["worker"] for each in peer.says()] == [0, 1]
        with server() as address:
            peer.tell(address)
            assert peer.says()["worker"] == 2
            assert peer.says() in ("ServerLost", "StaleSession")  # one of the others, whose server is gone
            assert peer.says()["worker"] == 2  # still
            peer.tell("")
            peer.process.join(PATIENCE_SECONDS)
            assert peer.process.exitcode == 0


def test_a_call_without_an_answer_in_time_is_a_lost_server() -> None:
    side = Side()
    with ExitStack() as stack:
        address = stack.enter_context(server(side=side, call_timeout_seconds=1.0))
        peer = stack.enter_context(Peer("timeout", address))
        kind, text, seconds = peer.says()
        side.released.set()
        assert kind == "ServerLost"
        assert text.startswith("ask: RPCErr:1:RPC ran for more than set timeout (1000 ms)")
        assert 0.9 < seconds < PATIENCE_SECONDS / 2


def test_an_agent_whose_connection_is_lost_is_replaced_by_the_next_that_joins() -> None:
    with ExitStack() as stack:
        peer = stack.enter_context(Peer("cut", stack.enter_context(server())))
        assert peer.says()["worker"] == 1
        assert peer.says()["worker"] == 0  # its calls go by the new one


def test_workers_that_die_anywhere_on_their_way_leave_no_membership(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with ExitStack() as stack:
        service = RecordingService(3)
        address = stack.enter_context(server(service))
        for place in ("admission", "join", "ask", "register"):
            peer = stack.enter_context(Peer(place, address))
            if place == "register":
                wait_until(lambda: service.registered, "its registering")
                peer.process.kill()
            else:
                assert peer.says() == "dies"
            peer.process.join(PATIENCE_SECONDS)
            wait_until(lambda: len(service.memberships) == 0, "the end of its membership")
        wait_until(
            lambda: (
                "left without joining, as one that evaluates, or looks for the run, does: its connection was closed"
                in caplog.text
            ),
            "the end of a lease",
        )
        assert service.evicted == 3 * ["its connection was closed"]
        assert len(service.transports) == 2  # of those that have got so far
        assert stack.enter_context(Peer("rejoin", address)).says()["worker"] == 0  # the number is free
