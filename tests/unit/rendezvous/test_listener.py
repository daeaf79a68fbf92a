"""Listener and lease over real sockets: joining, refusals, and the detection of a lost peer on each side."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager

import pytest

from ormo_rpc.errors import Refused, RunEnded, ServerLost
from ormo_rpc.rendezvous import listener as module
from ormo_rpc.rendezvous.lease import Lease, connect
from ormo_rpc.rendezvous.listener import Listener
from ormo_rpc.rendezvous.memberships import Membership
from ormo_rpc.rendezvous.protocol import JoinRequest
from ormo_rpc.rendezvous.secret import Secret
from tests.support.processes import PATIENCE_SECONDS, wait_until
from tests.support.rendezvous import join_response

SECRET = Secret("a secret that only we two know")


class Handler:
    """Gives every process a membership, or raises an error; notes its calls."""

    def __init__(self, error: ValueError | None = None) -> None:
        self.error = error
        self.requests: list[JoinRequest] = []
        self.calls: list[tuple[str, int, str]] = []

    def join(self, request: JoinRequest) -> Membership:
        """Give a membership, or raise the error."""
        if self.error is not None:
            raise self.error
        self.requests.append(request)
        return Membership(len(self.requests) - 1, request.pid, request.host, request.slot_id)

    def evict(self, membership: Membership, reason: str) -> None:
        """Note it."""
        self.calls.append(("evict", membership.worker, reason))

    def request_leave(self, membership: Membership) -> None:
        """Note it."""
        self.calls.append(("request_leave", membership.worker, ""))


@contextmanager
def listening(handler: Handler, timeout_seconds: float = 1.0) -> Generator[tuple[str, int]]:
    """A listener with this handler; the value is its address."""
    response = join_response(
        "seed: 3\n", transport={"agent": "uv://127.0.0.1:9"}, heartbeat_seconds=0.05, timeout_seconds=timeout_seconds
    )
    with socket.create_server(("127.0.0.1", 0)) as sock:
        with Listener(sock, SECRET, handler, response, timeout_seconds):
            yield sock.getsockname()[:2]
        sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts


def join(address: tuple[str, int], secret: Secret = SECRET, timeout_seconds: float = PATIENCE_SECONDS) -> Lease:
    return connect(address, secret, preferred_worker=5, slot_id="slot", timeout_seconds=timeout_seconds)


def test_a_worker_that_knows_the_secret_joins_and_gets_the_join_response() -> None:
    handler = Handler()
    with listening(handler) as address, join(address) as lease:
        response = lease.join_response
        assert (response.worker, response.config, response.transport) == (0, "seed: 3\n", {"agent": "uv://127.0.0.1:9"})
        assert len(response.session_id) == 32
        assert (handler.requests[0].preferred_worker, handler.requests[0].slot_id) == (5, "slot")
        lease.leave()
        wait_until(lambda: ("request_leave", 0, "") in handler.calls, "the request to leave")
        assert not lease.lost.is_set()


def test_a_refused_worker_and_the_log_get_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    with listening(Handler(ValueError("no room"))) as address:
        with pytest.raises(Refused, match=r"\Athe server at 127\.0\.0\.1:\d+ refused this worker: wrong secret\Z"):
            join(address, Secret("a secret of somebody else"))
        with pytest.raises(Refused, match=r"\Athe server at 127\.0\.0\.1:\d+ refused this worker: no room\Z"):
            join(address)
        wait_until(lambda: len(caplog.records) == 2, "both warnings")
    said = sorted(re.sub(r"127\.0\.0\.1:\d+", "HERE", record.getMessage()) for record in caplog.records)
    assert said == ["refused a connection from HERE: no room", "refused a connection from HERE: wrong secret"]
    assert "somebody else" not in caplog.text


def test_a_worker_that_joins_after_the_end_gets_run_ended() -> None:
    handler = Handler(RunEnded("the run has ended"))
    with listening(handler) as address, pytest.raises(RunEnded, match=r"\Athe run has ended\Z"):
        join(address)


def test_a_closed_connection_is_noticed_at_once_on_both_sides() -> None:
    handler = Handler()
    with listening(handler, timeout_seconds=PATIENCE_SECONDS) as address:
        with join(address):
            pass
        wait_until(lambda: handler.calls == [("evict", 0, "its connection was closed")], "the eviction")
        lease = join(address).__enter__()
    assert lease.lost.wait(PATIENCE_SECONDS / 2)  # the listener is closed: long before the time-out
    lease.__exit__()
    assert len(handler.calls) == 1  # the listener has closed that connection itself, so nobody is evicted


@pytest.mark.parametrize("silent", ["worker", "server"])
def test_a_silent_side_is_noticed_by_the_other_one(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    handler, noticed = Handler(), threading.Event()
    send = module.send

    def send_no_heartbeat(sock: socket.socket, message: dict[str, object]) -> None:
        if "heartbeat" in message:
            assert noticed.wait(PATIENCE_SECONDS)
        send(sock, message)

    if silent == "worker":
        monkeypatch.setattr(Lease, "_send_heartbeats", lambda _: None)
    else:
        monkeypatch.setattr(module, "send", send_no_heartbeat)
    with listening(handler, timeout_seconds=0.3) as address, join(address) as lease:
        assert lease.lost.wait(PATIENCE_SECONDS)
        noticed.set()
        if silent == "worker":
            wait_until(lambda: handler.calls == [("evict", 0, "it was silent for 0.3 s")], "the eviction")


@pytest.mark.slow
def test_heartbeats_keep_a_lease_for_longer_than_the_time_out() -> None:
    handler = Handler()
    with listening(handler, timeout_seconds=0.5) as address, join(address) as lease:
        assert not lease.lost.wait(1.5)
        assert handler.calls == []


def test_a_worker_that_violates_the_protocol_is_evicted() -> None:
    handler = Handler()
    with listening(handler) as address, join(address) as lease:
        lease.connection.sendall(b"[1, 2]\n")
        wait_until(lambda: handler.calls, "the eviction")
    assert handler.calls[0] == ("evict", 0, "it violated the protocol: a JSON list came, expected an object")


def test_silent_connections_do_not_keep_workers_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HANDSHAKE_TIMEOUT_SECONDS", 0.2)
    with listening(Handler()) as address:
        strangers = [socket.create_connection(address) for _ in range(2 * module.MAX_UNAUTHENTICATED)]
        with join(address) as lease:
            assert lease.join_response.worker == 0
        for stranger in strangers:
            stranger.close()


def test_connecting_to_a_server_that_is_not_there_times_out(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()[:2]
    with pytest.raises(
        ServerLost, match=rf"\Ano server can be joined at 127\.0\.0\.1:{free[1]}: .*refused; gave up after 0\.\d s\Z"
    ):
        join(free, timeout_seconds=0.5)
    assert "trying for" not in caplog.text  # which is logged after a longer time
