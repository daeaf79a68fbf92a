"""Listener and lease over real sockets: admission, refusals, and the detection of a lost peer on each side."""

from __future__ import annotations

import logging
import os
import queue
import re
import socket
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

from ormo_rpc.errors import Refused, WireError
from ormo_rpc.rendezvous import listener as module
from ormo_rpc.rendezvous.lease import Lease, connect
from ormo_rpc.rendezvous.listener import Listener
from ormo_rpc.rendezvous.protocol import Admission, LineReader, authenticate_server
from ormo_rpc.rendezvous.secret import Secret
from tests.support.processes import PATIENCE_SECONDS, wait_until

SECRET = Secret("a secret that only we two know")


class Handler:
    """Admits every process, answers its messages, or raises an error; notes its calls."""

    def __init__(self, timeout_seconds: float = 1.0, error: ValueError | None = None) -> None:
        self.timeout_seconds = timeout_seconds
        self.error = error
        self.holders: list[str] = []
        self.calls: list[tuple[str, str]] = []

    def admit(self, holder: str) -> Admission:
        """Admit a process, or raise the error."""
        if self.error is not None:
            raise self.error
        self.holders.append(holder)
        return Admission(
            admission_id=str(len(self.holders) - 1),
            control="socket",
            agent="uv://127.0.0.1:9",
            heartbeat_seconds=0.05,
            timeout_seconds=self.timeout_seconds,
            call_timeout_seconds=PATIENCE_SECONDS,
        )

    def received(self, admission_id: str, message: Mapping[str, Any], send: Callable[[Mapping[str, Any]], None]) -> None:
        """Send a message back."""
        if "bad" in message:
            raise WireError("it is bad")
        if "odd" in message:
            raise KeyError("odd")
        send({"got": message, "by": admission_id})

    def ended(self, admission_id: str, reason: str) -> None:
        """Note it."""
        self.calls.append((admission_id, reason))


@contextmanager
def listening(handler: Handler) -> Generator[tuple[str, int]]:
    """A listener with this handler; the value is its address."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        with Listener(sock, SECRET, handler, handler.timeout_seconds):
            yield sock.getsockname()[:2]
        sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts


def admitted(address: tuple[str, int], secret: Secret = SECRET) -> Lease:
    return connect(address, secret, timeout_seconds=PATIENCE_SECONDS)


def test_a_process_that_knows_the_secret_is_admitted_and_both_sides_exchange_messages() -> None:
    handler, answers = Handler(), queue.SimpleQueue[Mapping[str, Any]]()
    with listening(handler) as address:
        lease = admitted(address)
        lease.received = answers.put
        with lease:
            assert (lease.admission.control, lease.admission.agent) == ("socket", "uv://127.0.0.1:9")
            assert handler.holders == [f"pid {os.getpid()} on {socket.gethostname()[:64]}"]
            lease.send({"question": 7})
            assert answers.get(timeout=PATIENCE_SECONDS) == {"got": {"question": 7}, "by": "0"}
            assert not lease.lost.is_set()
        assert answers.get(timeout=PATIENCE_SECONDS) == {}  # the end


def test_attempts_that_were_given_up_before_a_server_was_there_are_no_refusals(caplog: pytest.LogCaptureFixture) -> None:
    """While a server is started again, its workers wait in the queue of the socket, give up, and try once more."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        for _ in range(3):
            with pytest.raises(TimeoutError):
                connect(sock.getsockname()[:2], SECRET, timeout_seconds=0.02)
        handler = Handler()
        with Listener(sock, SECRET, handler, handler.timeout_seconds), admitted(sock.getsockname()[:2]):
            assert len(handler.holders) == 1
        sock.shutdown(socket.SHUT_RDWR)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_refused_worker_and_the_log_get_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    with listening(Handler(error=ValueError("no room"))) as address:
        with pytest.raises(Refused, match=r"\Athe server at 127\.0\.0\.1:\d+ refused this worker: wrong secret\Z"):
            admitted(address, Secret("a secret of somebody else"))
        with pytest.raises(Refused, match=r"\Athe server at 127\.0\.0\.1:\d+ refused this worker: no room\Z"):
            admitted(address)
        wait_until(lambda: len(caplog.records) == 2, "both warnings")
    said = sorted(re.sub(r"127\.0\.0\.1:\d+", "HERE", record.getMessage()) for record in caplog.records)
    assert said == ["refused a connection from HERE: no room", "refused a connection from HERE: wrong secret"]
    assert "somebody else" not in caplog.text


def test_a_closed_connection_is_noticed_at_once_on_both_sides() -> None:
    handler = Handler(PATIENCE_SECONDS)
    with listening(handler) as address:
        with admitted(address):
            pass
        wait_until(lambda: handler.calls == [("0", "its connection was closed")], "the end of the lease")
        lease = admitted(address).__enter__()
    assert lease.lost.wait(PATIENCE_SECONDS / 2)  # the listener is closed: long before the time-out
    lease.__exit__()
    assert len(handler.calls) == 1  # the listener has closed that connection itself, so nobody is told


@pytest.mark.parametrize("silent", ["worker", "server"])
def test_a_silent_side_is_noticed_by_the_other_one(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    handler, noticed = Handler(0.3), threading.Event()
    send = module.send

    def send_no_heartbeat(sock: socket.socket, message: dict[str, object]) -> None:
        if "heartbeat" in message:
            assert noticed.wait(PATIENCE_SECONDS)
        send(sock, message)

    if silent == "worker":
        monkeypatch.setattr(Lease, "_send_heartbeats", lambda _: None)
    else:
        monkeypatch.setattr(module, "send", send_no_heartbeat)
    with listening(handler) as address, admitted(address) as lease:
        assert lease.lost.wait(PATIENCE_SECONDS)
        noticed.set()
        if silent == "worker":
            wait_until(lambda: handler.calls == [("0", "it was silent for 0.3 s")], "the end of the lease")


@pytest.mark.slow
def test_heartbeats_keep_a_lease_for_longer_than_the_time_out() -> None:
    handler = Handler(0.5)
    with listening(handler) as address, admitted(address) as lease:
        assert not lease.lost.wait(1.5)
        assert handler.calls == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"[1, 2]\n", "it violated the protocol: a JSON list came, expected an object"),
        (b'{"bad": 1}\n', "it violated the protocol: it is bad"),
        (b'{"odd": 1}\n', "the server failed: KeyError: 'odd'"),
    ],
)
def test_a_worker_that_violates_the_protocol_loses_its_lease_and_so_does_one_that_cannot_be_served(
    line: bytes, reason: str
) -> None:
    handler = Handler()
    with listening(handler) as address, admitted(address) as lease:
        lease.connection.sendall(line)
        wait_until(lambda: handler.calls, "the end of the lease")
    assert handler.calls[0] == ("0", reason)


def test_silent_connections_do_not_keep_workers_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HANDSHAKE_TIMEOUT_SECONDS", 0.2)
    with listening(Handler()) as address:
        strangers = [socket.create_connection(address) for _ in range(2 * module.MAX_UNAUTHENTICATED)]
        with admitted(address) as lease:
            assert lease.admission.admission_id == "0"
        for stranger in strangers:
            stranger.close()


def test_a_request_for_neither_a_lease_nor_a_stream_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    with listening(Handler()) as address, socket.create_connection(address) as connection:
        reader = LineReader(connection)
        authenticate_server(reader, SECRET, {"lease": {"pid": "1"}}, PATIENCE_SECONDS)
        said = "handshake: got a request for neither a lease, with pid and host, nor a stream"
        assert reader.receive(PATIENCE_SECONDS, 1000) == {"error": said}
    assert said in caplog.text
