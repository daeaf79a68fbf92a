"""Messages of the rendezvous protocol: lines of JSON with limits, and the fields of an admission."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ormo_rpc.errors import WireError
from ormo_rpc.rendezvous.protocol import Admission, LineReader, from_server, send
from tests.support.rendezvous import connected_sockets

LIMIT = 100
PATIENCE = 20.0
"""Seconds that a test waits for what has to come."""


def test_messages_arrive_complete_and_in_order_however_they_are_split() -> None:
    messages = [{"n": n, "text": "ünï\n\u2028", "list": [1, None, 2.5]} for n in range(5)]
    with connected_sockets() as (here, there):
        for message in messages:
            send(here, message)
        data = there.recv(10_000)
        assert data.count(b"\n") == 5
        reader = LineReader(there)
        for cut in range(0, len(data), 7):
            here.sendall(data[cut : cut + 7])
        assert [reader.receive(PATIENCE, LIMIT) for _ in messages] == messages
        here.close()
        with pytest.raises(EOFError, match=r"^the connection has ended$"):
            reader.receive(PATIENCE, LIMIT)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"x" * LIMIT, "a line of more than 100 bytes came, expected a shorter one"),
        (b"x" * LIMIT + b"\n", "a line of more than 100 bytes came, expected a shorter one"),
        (b'{"a": "\xff"}\n', "a line came that is not text in UTF-8, expected a JSON object"),
        (b"{'a': 1}\n", "a line came that is not JSON, expected a JSON object"),
        (b"\n", "a line came that is not JSON, expected a JSON object"),
        (b'{"a": NaN}\n', "a line came that is not JSON, expected a JSON object"),
        (b'{"a": Infinity}\n', "a line came that is not JSON, expected a JSON object"),
        (b"[1]\n", "a JSON list came, expected an object"),
        (b"null\n", "a JSON NoneType came, expected an object"),
    ],
)
def test_a_line_that_is_not_a_json_object_is_refused(data: bytes, text: str) -> None:
    with connected_sockets() as (here, there):
        here.sendall(data)
        with pytest.raises(WireError, match=f"^{text}$"):
            LineReader(there).receive(PATIENCE, LIMIT)


@pytest.mark.parametrize("data", [b"[" * 200_000 + b"\n", b'{"a":' * 100_000 + b"\n", b'{"a": ' + b"9" * 10_000 + b"}\n"])
def test_deep_nesting_and_long_numbers_are_refused(data: bytes) -> None:
    with connected_sockets() as (here, there), ThreadPoolExecutor(1) as pool:
        pool.submit(here.sendall, data)
        with pytest.raises(WireError, match=r"^a line came that is not JSON, expected a JSON object$"):
            LineReader(there).receive(PATIENCE, 10**6)


def test_a_line_of_exactly_the_limit_is_accepted() -> None:
    with connected_sockets() as (here, there):
        line = b'{"a": "' + b"x" * (LIMIT - 10) + b'"}\n'
        assert len(line) == LIMIT
        here.sendall(line)
        assert LineReader(there).receive(PATIENCE, LIMIT) == {"a": "x" * (LIMIT - 10)}


def test_a_connection_that_ends_within_a_message_is_an_error() -> None:
    with connected_sockets() as (here, there):
        here.sendall(b'{"a"')
        here.close()
        with pytest.raises(WireError, match=r"^the connection ended in the middle of a message, after 4 bytes of it$"):
            LineReader(there).receive(PATIENCE, LIMIT)


def test_a_timed_out_receive_keeps_what_has_arrived() -> None:
    with connected_sockets() as (here, there):
        reader = LineReader(there)
        here.sendall(b'{"a": ')
        with pytest.raises(TimeoutError, match=r"^no complete message came in time$"):
            reader.receive(0.05, LIMIT)
        here.sendall(b"1}\n")
        assert reader.receive(PATIENCE, LIMIT) == {"a": 1}


def test_slow_bytes_do_not_extend_the_deadline() -> None:
    stop = threading.Event()
    with connected_sockets() as (here, there), ThreadPoolExecutor(1) as pool:

        def trickle() -> None:
            while not stop.wait(0.02):
                here.sendall(b" ")

        done = pool.submit(trickle)
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            LineReader(there).receive(0.5, 10**6)
        waited = time.monotonic() - began
        stop.set()
        done.result(PATIENCE)
    assert 0.5 <= waited < PATIENCE / 2


def test_sending_to_a_peer_that_does_not_read_times_out() -> None:
    with connected_sockets() as (here, _), pytest.raises(TimeoutError, match=r"^the other side does not read in time$"):
        send(here, {"a": "x" * 10**7}, timeout_seconds=0.05)


def test_a_message_that_is_not_json_is_not_sent() -> None:
    with connected_sockets() as (here, there):
        with pytest.raises(ValueError, match="not JSON compliant"):
            send(here, {"a": float("nan")})
        send(here, {"a": 1})
        assert LineReader(there).receive(PATIENCE, LIMIT) == {"a": 1}, "part of the first message was sent"


def test_receiving_does_not_change_the_sockets_time_out() -> None:
    with connected_sockets() as (here, there):
        there.settimeout(3.5)
        send(here, {})
        LineReader(there).receive(PATIENCE, LIMIT)
        assert there.gettimeout() == 3.5


def test_an_admission_names_its_missing_fields() -> None:
    with pytest.raises(WireError, match=r"\Aadmission: got no agent, timeout_seconds, call_timeout_seconds; install "):
        from_server(Admission, {"admission_id": "a", "control": "rpc", "heartbeat_seconds": 1.0}, "admission")
