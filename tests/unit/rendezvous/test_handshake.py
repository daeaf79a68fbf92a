"""The secret, the messages of the door and its handshake: what is proved, what is refused, and that nobody is held up."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import hmac
import json
import os
import pickle
import socket
import stat
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ormo_rpc.errors import ConfigError, Refused, WireError
from ormo_rpc.rendezvous import protocol as wire
from ormo_rpc.rendezvous.protocol import LineReader, greet_server, greet_worker, send
from ormo_rpc.rendezvous.secret import PROTOCOL, Secret, new_secret, nonce, proof, read_secret, verify, write_secret

SECRET = Secret("correct horse battery staple")
HELLO = {"process": 17, "torch": "2.14", "rank": None}
LIMIT = 100
PATIENCE = 20.0
"""Seconds that a test waits for what has to come."""


@contextlib.contextmanager
def pair() -> Generator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection."""
    here, there = socket.socketpair()
    with here, there:
        yield here, there


# ---------------------------------------------------------------------------------------------------------------- the secret


def test_a_secret_is_written_for_its_owner_alone_and_comes_back(tmp_path: Path) -> None:
    secret, file = new_secret(), tmp_path / "secret"
    write_secret(file, secret)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert read_secret(str(file)) == secret
    assert [path.name for path in tmp_path.iterdir()] == ["secret"], "a partial file is left"
    write_secret(file, SECRET)  # over an older one
    assert read_secret(str(file)) == SECRET != secret


def test_secrets_made_for_runs_are_long_and_differ() -> None:
    made = {new_secret().reveal() for _ in range(100)}
    assert len(made) == 100
    assert all(len(bytes.fromhex(text)) == 32 for text in made)


def test_a_file_goes_before_the_environment_and_neither_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORMO_RPC_SECRET", raising=False)
    assert read_secret(None) is None
    monkeypatch.setenv("ORMO_RPC_SECRET", f" {SECRET.reveal()}\n")
    assert read_secret(None) == SECRET
    write_secret(tmp_path / "secret", new_secret())
    assert read_secret(str(tmp_path / "secret")) != SECRET


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_file_that_others_can_read_is_refused(mode: int, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    write_secret(file, SECRET)
    file.chmod(mode)
    with pytest.raises(
        ConfigError, match=rf"^{file}: its mode is {mode:04o}, so others .* expected 0600; run `chmod 600`"
    ) as caught:
        read_secret(str(file))
    assert SECRET.reveal() not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "secret: got 0 characters, expected at least 16; `openssl rand -hex 32` makes one"),
        (b"fifteen letters\n", "secret: got 15 characters, expected at least 16; .*"),
        (b"x" * 4097, "it has more than 4096 bytes, expected a secret of one line"),
        (b"\xff" * 20, "it is not text in UTF-8, expected a secret of one line"),
    ],
)
def test_what_is_no_secret_is_refused_with_the_files_name(content: bytes, text: str, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.touch(0o600)
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^{file}: {text}$"):
        read_secret(str(file))


def test_a_secret_in_the_environment_that_is_too_short_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORMO_RPC_SECRET", "too short")
    with pytest.raises(ConfigError, match=r"^the environment variable ORMO_RPC_SECRET: secret: got 9 characters") as caught:
        read_secret(None)
    assert "too short" not in str(caught.value)


def test_a_missing_file_a_directory_and_a_pipe_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the secret cannot be read: No such file or directory$"):
        read_secret(str(tmp_path / "secret"))
    with pytest.raises(ConfigError, match=r"the secret cannot be read: Is a directory$"):
        read_secret(str(tmp_path))
    os.mkfifo(tmp_path / "pipe", 0o600)  # whose opening waits for a writer
    with pytest.raises(ConfigError, match=r"it is not a regular file, expected one with the secret$"):
        read_secret(str(tmp_path / "pipe"))


def test_a_secret_is_not_written_through_a_symbolic_link(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    (tmp_path / "secret").symlink_to(target)
    with pytest.raises(
        ConfigError, match=r"secret: it is a symbolic link, expected a file of our own; remove it or name another one$"
    ):
        write_secret(tmp_path / "secret", SECRET)
    assert target.read_text() == "mine"
    with pytest.raises(ConfigError, match=r"the secret cannot be written: No such file or directory$"):
        write_secret(tmp_path / "missing" / "secret", SECRET)


def test_a_secret_does_not_show_itself() -> None:
    for shown in (repr(SECRET), str(SECRET), f"{SECRET}", "%s" % (SECRET,), repr([SECRET]), repr({"secret": SECRET})):  # noqa: UP031 - each way of showing one
        assert "horse" not in shown
    for leak in (pickle.dumps, copy.deepcopy, json.dumps, vars, hash):
        with pytest.raises(TypeError):
            leak(SECRET)  # pyright: ignore[reportArgumentType, reportCallIssue] # that is the test


def test_a_proof_is_the_documented_hmac() -> None:
    said = f'["ormo_rpc door", {PROTOCOL}, "worker", "S", "C", {{"a": 1, "b": null}}]'
    expected = hmac.new(b"correct horse battery staple", said.encode(), hashlib.sha256).hexdigest()
    assert proof(SECRET, "worker", "S", "C", {"b": None, "a": 1}) == expected
    assert verify(expected, SECRET, "worker", "S", "C", {"a": 1, "b": None})


@pytest.mark.parametrize(
    "change",
    [
        {"secret": Secret("correct horse battery stapl!")},
        {"role": "server"},
        {"server_nonce": "s"},
        {"worker_nonce": "c"},
        {"hello": {**HELLO, "process": 18}},
        {"hello": {}},
        {"server_nonce": "C", "worker_nonce": "S"},
    ],
)
def test_a_proof_holds_for_one_secret_role_connection_and_hello(change: dict[str, Any]) -> None:
    settings: dict[str, Any] = {
        "secret": SECRET,
        "role": "worker",
        "server_nonce": "S",
        "worker_nonce": "C",
        "hello": HELLO,
    }
    good = proof(**settings)
    assert verify(good, **settings)
    assert not verify(good, **{**settings, **change})
    for other in (None, 5, good[:-1], good.upper(), good + "0", "é" * 64, [good], "\ud800"):
        assert not verify(other, **settings)


# --------------------------------------------------------------------------------------------------------------- the messages


def test_messages_come_whole_and_in_order_however_they_are_cut() -> None:
    messages = [{"n": n, "text": "ünï\n\u2028", "list": [1, None, 2.5]} for n in range(5)]
    with pair() as (here, there):
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
def test_a_line_that_is_no_message_is_refused(data: bytes, text: str) -> None:
    with pair() as (here, there):
        here.sendall(data)
        with pytest.raises(WireError, match=f"^{text}$"):
            LineReader(there).receive(PATIENCE, LIMIT)


@pytest.mark.parametrize("data", [b"[" * 200_000 + b"\n", b'{"a":' * 100_000 + b"\n", b'{"a": ' + b"9" * 10_000 + b"}\n"])
def test_depth_and_digits_that_break_a_parser_are_refused(data: bytes) -> None:
    with pair() as (here, there), ThreadPoolExecutor(1) as pool:
        pool.submit(here.sendall, data)
        with pytest.raises(WireError, match=r"^a line came that is not JSON, expected a JSON object$"):
            LineReader(there).receive(PATIENCE, 10**6)


def test_a_line_of_just_the_limit_is_taken() -> None:
    with pair() as (here, there):
        line = b'{"a": "' + b"x" * (LIMIT - 10) + b'"}\n'
        assert len(line) == LIMIT
        here.sendall(line)
        assert LineReader(there).receive(PATIENCE, LIMIT) == {"a": "x" * (LIMIT - 10)}


def test_an_end_in_the_middle_of_a_message_is_not_a_clean_one() -> None:
    with pair() as (here, there):
        here.sendall(b'{"a"')
        here.close()
        with pytest.raises(WireError, match=r"^the connection ended in the middle of a message, after 4 bytes of it$"):
            LineReader(there).receive(PATIENCE, LIMIT)


def test_silence_ends_at_its_deadline_and_what_had_come_is_kept() -> None:
    with pair() as (here, there):
        reader = LineReader(there)
        here.sendall(b'{"a": ')
        with pytest.raises(TimeoutError, match=r"^no whole message came in time$"):
            reader.receive(0.05, LIMIT)
        here.sendall(b"1}\n")
        assert reader.receive(PATIENCE, LIMIT) == {"a": 1}


def test_a_trickle_of_bytes_does_not_put_the_deadline_off() -> None:
    stop = threading.Event()
    with pair() as (here, there), ThreadPoolExecutor(1) as pool:

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


def test_whoever_does_not_read_does_not_hold_the_sender_for_ever() -> None:
    with pair() as (here, _), pytest.raises(TimeoutError, match=r"^the other side does not read in time$"):
        send(here, {"a": "x" * 10**7}, timeout_seconds=0.05)


def test_only_json_is_sent() -> None:
    with pair() as (here, there):
        with pytest.raises(ValueError, match="not JSON compliant"):
            send(here, {"a": float("nan")})
        send(here, {"a": 1})
        assert LineReader(there).receive(PATIENCE, LIMIT) == {"a": 1}, "part of the first message was sent"


def test_reading_leaves_the_sockets_own_time_out_alone() -> None:
    with pair() as (here, there):
        there.settimeout(3.5)
        send(here, {})
        LineReader(there).receive(PATIENCE, LIMIT)
        assert there.gettimeout() == 3.5


# -------------------------------------------------------------------------------------------------------------- the handshake

Side = Callable[[LineReader], Any]


def meet(server: Side, worker: Side) -> tuple[Future[Any], Future[Any]]:
    """Both sides at once, each closing its end when it is done; their outcomes."""
    with pair() as (here, there), ThreadPoolExecutor(2) as pool:

        def act(side: Side, sock: socket.socket) -> Any:
            with sock:
                return side(LineReader(sock))

        futures = pool.submit(act, server, here), pool.submit(act, worker, there)
        for future in futures:
            future.exception(PATIENCE)
        return futures


def serve(reader: LineReader) -> dict[str, Any]:
    return greet_worker(reader, SECRET, PATIENCE)


def work(reader: LineReader) -> None:
    greet_server(reader, SECRET, HELLO, PATIENCE)


def test_both_sides_prove_themselves_and_go_on_talking() -> None:
    def server(reader: LineReader) -> dict[str, Any]:
        hello = serve(reader)
        send(reader.sock, {"join_response": hello["process"]})  # right behind the proof
        return {**hello, "then": reader.receive(PATIENCE, LIMIT)}

    def worker(reader: LineReader) -> dict[str, Any]:
        work(reader)
        send(reader.sock, {"heartbeat": 1})
        return reader.receive(PATIENCE, LIMIT)

    served, worked = meet(server, worker)
    assert served.result() == {**HELLO, "then": {"heartbeat": 1}}
    assert worked.result() == {"join_response": 17}


def test_a_worker_with_another_secret_is_told_so_and_learns_nothing_else() -> None:
    seen: list[bytes] = []

    def worker(reader: LineReader) -> None:
        try:
            greet_server(reader, new_secret(), HELLO, PATIENCE)
        finally:
            seen.append(reader.sock.recv(1000))

    served, worked = meet(serve, worker)
    assert str(served.exception()) == "wrong secret"
    assert type(served.exception()) is WireError
    assert type(worked.exception()) is Refused
    assert str(worked.exception()) == "wrong secret"
    assert seen == [b""]


def fake_server(answer: Callable[[dict[str, Any], str], dict[str, Any]], greeting: dict[str, Any] | None = None) -> Side:
    """A server that does not know the secret; ``answer`` gets what the worker said, and the server's nonce."""

    def server(reader: LineReader) -> dict[str, Any]:
        mine = nonce()
        send(reader.sock, {"ormo_rpc": PROTOCOL, "nonce": mine} if greeting is None else greeting)
        send(reader.sock, answer(reader.receive(PATIENCE, 10_000), mine))
        return reader.receive(PATIENCE, 10_000)

    return server


@pytest.mark.parametrize(
    "answer",
    [
        lambda said, _: {"proof": said["proof"]},  # the worker's own, reflected
        lambda said, mine: {"proof": proof(new_secret(), "server", mine, said["nonce"], said["hello"])},
        lambda said, mine: {"proof": proof(SECRET, "server", mine, said["nonce"], {"process": 18})},
        lambda said, mine: {"proof": proof(SECRET, "server", said["nonce"], mine, said["hello"])},
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
    """A worker whose answer is changed after it was proved."""

    def worker(reader: LineReader) -> dict[str, Any]:
        theirs = reader.receive(PATIENCE, 10_000)["nonce"]
        mine = nonce()
        answer = {"ormo_rpc": PROTOCOL, "nonce": mine, "proof": proof(SECRET, "worker", theirs, mine, HELLO), "hello": HELLO}
        send(reader.sock, {**answer, **changes})
        return reader.receive(PATIENCE, 10_000)

    return worker


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"hello": {**HELLO, "process": 1}}, "wrong secret"),
        ({"nonce": nonce()}, "wrong secret"),
        ({"proof": 5}, "wrong secret"),
        ({"proof": "0" * 64}, "wrong secret"),
        ({"hello": [1]}, "the answer to the greeting has no nonce or no hello"),
        ({"nonce": "short"}, "the answer to the greeting has no nonce or no hello"),
        ({"nonce": "é" * 64}, "the answer to the greeting has no nonce or no hello"),
        (
            {"ormo_rpc": 99},
            f"protocol: the worker has version 99, the server version {PROTOCOL}; install the same ormo_rpc on both",
        ),
        (
            {"ormo_rpc": "x"},
            f"protocol: the worker has version none, the server version {PROTOCOL}; install the same ormo_rpc on both",
        ),
    ],
)
def test_an_answer_that_was_changed_is_refused(changes: dict[str, Any], text: str) -> None:
    served, worked = meet(serve, fake_worker(**changes))
    assert str(served.exception()) == text
    assert worked.result() == {"error": text}


def test_the_worker_of_the_test_above_is_taken_unchanged() -> None:
    assert meet(serve, fake_worker())[0].result() == HELLO


def test_an_answer_that_was_recorded_is_of_no_use_on_another_connection() -> None:
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


def test_versions_that_differ_are_both_named() -> None:
    def server(reader: LineReader) -> dict[str, Any]:
        send(reader.sock, {"ormo_rpc": 99, "nonce": nonce()})
        return reader.receive(PATIENCE, 10_000)

    served, worked = meet(server, work)
    text = f"protocol: the server has version 99, the worker version {PROTOCOL}; install the same ormo_rpc on both"
    assert str(worked.exception()) == text
    assert served.result() == {"error": text}


def test_a_worker_that_says_why_it_goes_is_heard() -> None:
    def worker(reader: LineReader) -> None:
        reader.receive(PATIENCE, 10_000)
        send(reader.sock, {"error": "another version"})

    served, _ = meet(serve, worker)
    assert type(served.exception()) is Refused
    assert str(served.exception()) == "another version"


def test_what_a_server_says_instead_of_a_greeting_is_told_on_one_line() -> None:
    _, worked = meet(lambda reader: send(reader.sock, {"error": "all places\n\x1b[31mare taken"}), work)
    assert type(worked.exception()) is Refused
    assert str(worked.exception()) == "all places??[31mare taken"


def test_a_silent_side_ends_the_handshake_in_time_and_a_closed_one_at_once() -> None:
    with pair() as (here, there):
        with pytest.raises(TimeoutError):
            greet_worker(LineReader(here), SECRET, 0.05)
        there.recv(1000)
        with pytest.raises(TimeoutError):
            greet_server(LineReader(there), SECRET, HELLO, 0.05)
    for side in (serve, work):
        with pair() as (here, there):
            there.shutdown(socket.SHUT_WR)
            with pytest.raises(EOFError):
                side(LineReader(here))


def test_the_secret_never_crosses() -> None:
    said: list[bytes] = []
    with pair() as (server, inner), pair() as (outer, worker), ThreadPoolExecutor(4) as pool:

        def relay(source: socket.socket, target: socket.socket) -> None:
            while data := source.recv(10_000):
                said.append(data)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

        relays = [pool.submit(relay, inner, outer), pool.submit(relay, outer, inner)]
        served, worked = pool.submit(serve, LineReader(server)), pool.submit(work, LineReader(worker))
        assert served.result(PATIENCE) == HELLO
        worked.result(PATIENCE)
        for sock in (server, worker):
            sock.shutdown(socket.SHUT_WR)
        for future in relays:
            future.result(PATIENCE)
    assert len(said) == 3
    assert SECRET.reveal().encode() not in b"".join(said)
    assert wire.PROTOCOL == PROTOCOL
