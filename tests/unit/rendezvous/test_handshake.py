"""The handshake: both sides authenticate, or the connection ends with the reason."""

from __future__ import annotations

import socket
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from ormo_rpc.errors import Refused, WireError
from ormo_rpc.rendezvous.protocol import LineReader, authenticate_server, authenticate_worker, send
from ormo_rpc.rendezvous.secret import PROTOCOL_VERSION, Secret, new_secret, nonce, proof
from tests.support.rendezvous import connected_sockets

SECRET = Secret("correct horse battery staple")
REQUEST = {"pid": 17, "torch": "2.14", "rank": None}
LIMIT = 100
PATIENCE = 20.0
"""Seconds that a test waits for what has to come."""

Side = Callable[[LineReader], Any]


def meet(server: Side, worker: Side) -> tuple[Future[Any], Future[Any]]:
    """Both sides at once, each closing its end when it is done; their outcomes."""
    with connected_sockets() as (here, there), ThreadPoolExecutor(2) as pool:

        def act(side: Side, sock: socket.socket) -> Any:
            with sock:
                return side(LineReader(sock))

        futures = pool.submit(act, server, here), pool.submit(act, worker, there)
        for future in futures:
            future.exception(PATIENCE)
        return futures


def serve(reader: LineReader) -> dict[str, Any]:
    return authenticate_worker(reader, SECRET, PATIENCE)


def work(reader: LineReader) -> None:
    authenticate_server(reader, SECRET, REQUEST, PATIENCE)


def test_both_sides_authenticate_and_then_exchange_messages() -> None:
    def server(reader: LineReader) -> dict[str, Any]:
        request = serve(reader)
        send(reader.sock, {"join_response": request["pid"]})  # right behind the proof
        return {**request, "then": reader.receive(PATIENCE, LIMIT)}

    def worker(reader: LineReader) -> dict[str, Any]:
        work(reader)
        send(reader.sock, {"heartbeat": 1})
        return reader.receive(PATIENCE, LIMIT)

    served, worked = meet(server, worker)
    assert served.result() == {**REQUEST, "then": {"heartbeat": 1}}
    assert worked.result() == {"join_response": 17}


def test_a_worker_with_a_wrong_secret_learns_only_that_it_is_wrong() -> None:
    seen: list[bytes] = []

    def worker(reader: LineReader) -> None:
        try:
            authenticate_server(reader, new_secret(), REQUEST, PATIENCE)
        finally:
            seen.append(reader.sock.recv(1000))

    served, worked = meet(serve, worker)
    assert str(served.exception()) == "wrong secret"
    assert type(served.exception()) is WireError
    assert type(worked.exception()) is Refused
    assert str(worked.exception()) == "wrong secret"
    assert seen == [b""]


def fake_server(answer: Callable[[dict[str, Any], str], dict[str, Any]], challenge: dict[str, Any] | None = None) -> Side:
    """A server that does not know the secret; ``answer`` gets the worker's answer and the server's nonce."""

    def server(reader: LineReader) -> dict[str, Any]:
        own_nonce = nonce()
        send(reader.sock, {"ormo_rpc": PROTOCOL_VERSION, "nonce": own_nonce} if challenge is None else challenge)
        send(reader.sock, answer(reader.receive(PATIENCE, 10_000), own_nonce))
        return reader.receive(PATIENCE, 10_000)

    return server


@pytest.mark.parametrize(
    "answer",
    [
        lambda said, _: {"proof": said["proof"]},  # the worker's own, reflected
        lambda said, own_nonce: {"proof": proof(new_secret(), "server", own_nonce, said["nonce"], said["request"])},
        lambda said, own_nonce: {"proof": proof(SECRET, "server", own_nonce, said["nonce"], {"pid": 18})},
        lambda said, own_nonce: {"proof": proof(SECRET, "server", said["nonce"], own_nonce, said["request"])},
        lambda _, __: {"proof": None},
        lambda _, __: {},
    ],
)
def test_a_server_that_does_not_know_the_secret_is_refused(answer: Callable[[dict[str, Any], str], dict[str, Any]]) -> None:
    served, worked = meet(fake_server(answer), work)
    assert type(worked.exception()) is WireError
    assert str(worked.exception()) == "the server does not know the secret"
    assert served.result() == {"error": "the server does not know the secret"}


def fake_worker(**changes: Any) -> Side:
    """A worker that changes its answer after it was proved."""

    def worker(reader: LineReader) -> dict[str, Any]:
        peer_nonce = reader.receive(PATIENCE, 10_000)["nonce"]
        own_nonce = nonce()
        answer = {
            "ormo_rpc": PROTOCOL_VERSION,
            "nonce": own_nonce,
            "proof": proof(SECRET, "worker", peer_nonce, own_nonce, REQUEST),
            "request": REQUEST,
        }
        send(reader.sock, {**answer, **changes})
        return reader.receive(PATIENCE, 10_000)

    return worker


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"request": {**REQUEST, "pid": 1}}, "wrong secret"),
        ({"nonce": nonce()}, "wrong secret"),
        ({"proof": 5}, "wrong secret"),
        ({"proof": "0" * 64}, "wrong secret"),
        ({"request": [1]}, "the answer to the server's nonce has no nonce or no request"),
        ({"nonce": "short"}, "the answer to the server's nonce has no nonce or no request"),
        ({"nonce": "é" * 64}, "the answer to the server's nonce has no nonce or no request"),
        (
            {"ormo_rpc": 99},
            f"protocol: the worker has version 99, the server version {PROTOCOL_VERSION}; install the same ormo_rpc on both",
        ),
        (
            {"ormo_rpc": "x"},
            f"protocol: the worker has version none, the server version {PROTOCOL_VERSION}; install the same ormo_rpc on both",
        ),
    ],
)
def test_a_changed_answer_is_refused(changes: dict[str, Any], text: str) -> None:
    served, worked = meet(serve, fake_worker(**changes))
    assert str(served.exception()) == text
    assert worked.result() == {"error": text}


def test_the_unchanged_answer_is_accepted() -> None:
    assert meet(serve, fake_worker())[0].result() == REQUEST


def test_a_recorded_answer_is_refused_on_another_connection() -> None:
    recorded: list[dict[str, Any]] = []

    def record(said: dict[str, Any], _: str) -> dict[str, Any]:
        recorded.append(said)
        return {}

    meet(fake_server(record), work)

    def replay(reader: LineReader) -> dict[str, Any]:
        reader.receive(PATIENCE, 10_000)
        send(reader.sock, recorded[0])
        return reader.receive(PATIENCE, 10_000)

    served, worked = meet(serve, replay)
    assert str(served.exception()) == "wrong secret"
    assert worked.result() == {"error": "wrong secret"}


def test_an_error_names_both_protocol_versions() -> None:
    def server(reader: LineReader) -> dict[str, Any]:
        send(reader.sock, {"ormo_rpc": 99, "nonce": nonce()})
        return reader.receive(PATIENCE, 10_000)

    served, worked = meet(server, work)
    text = f"protocol: the server has version 99, the worker version {PROTOCOL_VERSION}; install the same ormo_rpc on both"
    assert str(worked.exception()) == text
    assert served.result() == {"error": text}


def test_the_server_raises_the_reason_that_a_worker_gives() -> None:
    def worker(reader: LineReader) -> None:
        reader.receive(PATIENCE, 10_000)
        send(reader.sock, {"error": "another version"})

    served, _ = meet(serve, worker)
    assert type(served.exception()) is Refused
    assert str(served.exception()) == "another version"


def test_a_refusal_by_the_server_is_shown_on_one_printable_line() -> None:
    _, worked = meet(lambda reader: send(reader.sock, {"error": "all places\n\x1b[31mare taken"}), work)
    assert type(worked.exception()) is Refused
    assert str(worked.exception()) == "all places??[31mare taken"


def test_a_handshake_ends_with_a_silent_or_a_closed_peer() -> None:
    with connected_sockets() as (here, there):
        with pytest.raises(TimeoutError):
            authenticate_worker(LineReader(here), SECRET, 0.05)
        there.recv(1000)
        with pytest.raises(TimeoutError):
            authenticate_server(LineReader(there), SECRET, REQUEST, 0.05)
    for side in (serve, work):
        with connected_sockets() as (here, there):
            there.shutdown(socket.SHUT_WR)
            with pytest.raises(EOFError):
                side(LineReader(here))


def test_the_secret_never_crosses() -> None:
    said: list[bytes] = []
    with connected_sockets() as (server, inner), connected_sockets() as (outer, worker), ThreadPoolExecutor(4) as pool:

        def relay(source: socket.socket, target: socket.socket) -> None:
            while data := source.recv(10_000):
                said.append(data)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

        relays = [pool.submit(relay, inner, outer), pool.submit(relay, outer, inner)]
        served, worked = pool.submit(serve, LineReader(server)), pool.submit(work, LineReader(worker))
        assert served.result(PATIENCE) == REQUEST
        worked.result(PATIENCE)
        for sock in (server, worker):
            sock.shutdown(socket.SHUT_WR)
        for future in relays:
            future.result(PATIENCE)
    assert len(said) == 3
    assert SECRET.reveal().encode() not in b"".join(said)
