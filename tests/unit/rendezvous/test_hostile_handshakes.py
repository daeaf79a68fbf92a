"""Malformed lines and false handshakes by the ten thousand: each is read or refused, and proves nothing."""

from __future__ import annotations

import random
import socket
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager

import pytest

from ormo_rpc.errors import WireError
from ormo_rpc.rendezvous import protocol as wire
from ormo_rpc.rendezvous.protocol import LineReader, authenticate_worker
from ormo_rpc.rendezvous.secret import PROTOCOL_VERSION, Secret, proof
from tests.support.mutations import MESSAGES, mutated

SECRET = Secret("correct horse battery staple")
REQUEST = {"process": 17, "versions": ["2.14", None, 1.5], "name": "ü"}


@contextmanager
def said(data: bytes) -> Generator[LineReader]:
    """A connection whose other side has sent that and ended, so that no read waits."""
    here, there = socket.socketpair()
    with here, there:
        there.sendall(data)
        there.shutdown(socket.SHUT_WR)
        yield LineReader(here)


def test_ten_thousand_malformed_lines_are_read_or_refused() -> None:
    chance, outcomes = random.Random(1), Counter[str]()
    pieces = [
        b'{"a": 1}\n',
        b'{"a": [1, {"b": null}], "\\ud800": 1e5}\n',
        "{'ü': -0.0}\n".encode(),
        b"[[[[",
        b"\xff\xfe",
        b"\x00\n\r\n",
    ]
    for number in range(MESSAGES):
        data = chance.randbytes(chance.randrange(80)) if number % 4 == 0 else mutated(chance.choice(pieces), chance, pieces)
        with said(data) as reader:
            for _ in range(data.count(b"\n") + 1):
                try:
                    outcome = type(reader.receive(5.0, 60)).__name__
                except (WireError, EOFError) as error:
                    outcome = type(error).__name__
                outcomes[outcome] += 1
                if outcome == "EOFError":
                    break
    assert outcomes.total() >= MESSAGES
    assert outcomes.keys() == {"dict", "WireError", "EOFError"}
    assert min(outcomes.values()) > 200


def test_ten_thousand_false_handshakes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    server_nonce, worker_nonce = "5" * 64, "c" * 64
    monkeypatch.setattr(wire, "nonce", lambda: server_nonce)  # so that a right answer is known beforehand
    right = proof(SECRET, "worker", server_nonce, worker_nonce, REQUEST)
    answer = {"ormo_rpc": PROTOCOL_VERSION, "nonce": worker_nonce, "proof": right, "request": REQUEST}
    line = wire.json.dumps(answer).encode() + b"\n"
    with said(line) as reader:
        assert authenticate_worker(reader, SECRET, 5.0) == REQUEST
    false = [
        wire.json.dumps({**answer, name: value}).encode() + b"\n"
        for name in answer
        for value in (
            None,
            True,
            0,
            -1,
            1e300,
            10**40,
            "",
            "0" * 64,
            "é" * 64,
            "\ud800" * 64,
            [],
            {},
            [[[]]],
            {"a": {}},
            [right],
        )
    ]
    chance, outcomes = random.Random(2), Counter[str]()
    for number in range(MESSAGES):
        data = false[number] if number < len(false) else mutated(chance.choice([line, line, *false]), chance, [line, *false])
        with said(data) as reader:
            try:
                assert authenticate_worker(reader, SECRET, 5.0) == REQUEST, "a request that was not proved"
                assert b"\n" in data
                assert {**wire.json.loads(data[: data.index(b"\n")]), **answer} == wire.json.loads(data[: data.index(b"\n")])
                outcomes["taken"] += 1  # a change that is none, such as one more empty
            except (WireError, EOFError) as error:
                outcomes[str(error)] += 1
    assert outcomes.total() == MESSAGES
    assert outcomes["taken"] < MESSAGES / 20
    assert outcomes["wrong secret"] > 300
    assert SECRET.reveal() not in "".join(outcomes)
