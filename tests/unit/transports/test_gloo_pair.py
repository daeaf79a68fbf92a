"""Pairs between two processes: what is sent arrives, every wait ends, and nothing is left of a pair."""

from __future__ import annotations

import gc
import multiprocessing
import operator
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ormo_rpc.transports.gloo import Gloo, pair
from ormo_rpc.transports.gloo.addresses import TOKEN_BYTES, Address
from ormo_rpc.transports.gloo.pair import SERVER, WORKER, Pair, PairLost, make_pair
from tests.support.processes import PATIENCE_SECONDS, wait_until

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without Gloo")

LONG = timedelta(seconds=PATIENCE_SECONDS)
SHORT = timedelta(seconds=0.1)
SIZE = 1000
MUCH = 50_000_000
"""More bytes than the system keeps for a process that does not read."""
LOST = r"\Athe other side has closed the connection\Z"
_context = multiprocessing.get_context("forkserver")


@pytest.fixture(autouse=True, scope="module")
def _forkserver() -> None:  # pyright: ignore[reportUnusedFunction] # a fixture
    """Start the process that the others are forked from."""
    _context.set_forkserver_preload(["ormo_rpc.transports.gloo.pair"])
    forkserver.ensure_running()


def numbers(size: int = SIZE) -> Tensor:
    return torch.arange(size, dtype=torch.int64).to(torch.uint8)


def blank(size: int = SIZE) -> Tensor:
    return torch.zeros(size, dtype=torch.uint8)


def _made(pipe: Connection, host: str) -> Pair:
    """Make the worker's side of a pair."""

    def exchange(own: Address) -> Address:
        pipe.send(own)
        return pipe.recv()

    return make_pair(WORKER, host, exchange, PATIENCE_SECONDS)


def _send_much(pipe: Connection, host: str) -> None:
    """Make the worker's side of a pair; then send one large message, and its end."""
    pair = _made(pipe, host)
    pipe.send("made")
    sent = [pair.send(torch.ones(MUCH, dtype=torch.uint8), 0), pair.send_empty(1)]
    for transfer in sent:
        transfer.wait(LONG)
    pipe.recv()


def _peer(pipe: Connection, host: str) -> None:
    """Make the worker's side of a pair; then send back each message one byte larger, for as long as there are any."""
    pair = _made(pipe, host)
    message = blank()
    received = pair.receive(message, 0)
    pipe.send("made")
    try:
        while True:
            received.wait(LONG)
            answer = message + 1
            received = pair.receive(message, 0)
            pair.send(answer, 1).wait(LONG)
    except PairLost as error:
        pipe.send(str(error))


@contextmanager
def process(host: str = "127.0.0.1", does: Callable[[Connection, str], None] = _peer) -> Generator[tuple[Any, Connection]]:
    """Another process that makes a worker's side."""
    pipe, child_end = _context.Pipe()
    child = _context.Process(target=does, args=(child_end, host), daemon=True)
    child.start()
    child_end.close()
    try:
        yield child, pipe
    finally:
        child.kill()
        child.join()
        child.close()
        pipe.close()


def received(pipe: Connection) -> Any:
    assert pipe.poll(PATIENCE_SECONDS), "the other process does not answer"
    return pipe.recv()


def exchange_over(pipe: Connection) -> Callable[[Address], Address]:
    def exchange(own: Address) -> Address:
        other = received(pipe)
        pipe.send(own)
        return other

    return exchange


@contextmanager
def paired(host: str = "127.0.0.1", does: Callable[[Connection, str], None] = _peer) -> Generator[tuple[Pair, Any, Connection]]:
    """This process's side of a pair, the other process, and the pipe to it."""
    with process(host, does) as (child, pipe):
        pair = make_pair(SERVER, host, exchange_over(pipe), PATIENCE_SECONDS)
        assert received(pipe) == "made"
        try:
            yield pair, child, pipe
        finally:
            pair.close()


def answered(pair: Pair, message: Tensor) -> Tensor:
    answer = blank()
    received = pair.receive(answer, 1)
    pair.send(message, 0).wait(LONG)
    received.wait(LONG)
    return answer


def test_without_a_list_of_its_descriptors_a_process_makes_no_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair, "DESCRIPTORS", tmp_path / "fd")
    assert Gloo.unavailable() == f"there is no {tmp_path / 'fd'}, in which a pair's connection is found"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1"])
def test_messages_cross_both_ways_on_the_address_that_was_asked_for(host: str) -> None:
    if host == "::1" and not _has_ipv6():
        pytest.skip("this machine has no IPv6")
    with paired(host) as (pair, _, _pipe):
        for _ in range(3):
            assert torch.equal(answered(pair, numbers()), numbers() + 1)
        assert torch.equal(answered(pair, numbers(10))[:10], numbers(10) + 1)  # a smaller one than was posted
        (connection,) = pair._connections  # pyright: ignore[reportPrivateUsage] # nothing else tells its address
        assert host in (connection.getsockname()[0], connection.getpeername()[0])  # the end that listens has it for certain


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def test_the_end_of_the_other_process_ends_a_wait_and_all_later_calls() -> None:
    with paired() as (pair, child, _):
        waiting = pair.receive(blank(), 1)
        os.kill(child.pid, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(PairLost, match=LOST):
            waiting.wait(LONG)
        assert time.monotonic() - began < PATIENCE_SECONDS / 2
        for call in (lambda: pair.send(blank(), 0).wait(LONG), lambda: pair.receive(blank(), 1).wait(LONG)):
            with pytest.raises(PairLost):
                call()


def test_a_process_that_dies_while_its_message_is_half_way_ends_the_wait() -> None:
    with paired(does=_send_much) as (pair, child, _):
        message = blank(MUCH)
        posted, end = pair.receive(message, 0), pair.receive_empty(1)
        while not message[0]:
            assert child.is_alive()
        os.kill(child.pid, signal.SIGKILL)
        with suppress(PairLost):  # or all had left by then
            end.wait(LONG)
            posted.wait(LONG)
            assert message[-1]


def test_a_time_out_ends_the_pair_for_good() -> None:
    with paired() as (pair, child, _):
        os.kill(child.pid, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(PairLost, match=r"\Anothing came in time\Z"):
            pair.receive(blank(), 1).wait(SHORT)
        assert time.monotonic() - began < PATIENCE_SECONDS / 2
        with pytest.raises(PairLost, match=r"\Aan earlier time-out has ended it\Z"):
            pair.receive(blank(), 1).wait(LONG)


def test_closing_wakes_the_threads_of_both_sides_that_wait() -> None:
    with paired() as (pair, _, pipe):
        ended: list[tuple[float, str]] = []

        def wait() -> None:
            with pytest.raises(PairLost) as caught:
                waiting.wait(LONG)
            ended.append((time.monotonic(), str(caught.value)))

        waiting = pair.receive(blank(), 1)
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.05)  # most likely it waits by then; otherwise the same must hold
        began = time.monotonic()
        pair.close()
        thread.join(PATIENCE_SECONDS)
        assert ended[0][0] - began < 1.0  # 3 ms, on a machine that does nothing else
        assert received(pipe) == "the other side has closed the connection"
        pair.close()  # again, which is no error


def test_a_closed_pair_leaves_the_others_alone() -> None:
    with paired() as (first, _, _pipe), paired() as (second, _, _other):
        first.close()
        assert torch.equal(answered(second, numbers()), numbers() + 1)


@pytest.mark.slow
def test_pairs_that_are_made_and_killed_in_a_row_leave_nothing() -> None:
    def counts() -> tuple[int, ...]:
        gc.collect()
        return tuple(sum(1 for _ in Path(folder).iterdir()) for folder in ("/proc/self/task", "/proc/self/fd"))

    if not Path("/proc/self/task").is_dir():
        pytest.skip("this system has no /proc")
    before: tuple[int, ...] = ()
    for _ in range(20):
        with paired() as (pair, child, _):
            message = blank()
            waiting = pair.receive(message, 1)
            os.kill(child.pid, signal.SIGKILL)
            with pytest.raises(PairLost):
                waiting.wait(LONG)
        del pair, waiting
        before = before or counts()
    wait_until(lambda: all(map(operator.le, counts(), before)), "the end of its threads and descriptors")


def test_a_peer_that_never_comes_is_an_error_after_the_time_out() -> None:
    elsewhere = replace(SOMEBODY, port=_unused_port())
    for host in ("127.0.0.1", "127.0.0.3"):  # Gloo lets the side with the smaller address wait for the other one
        began = time.monotonic()
        with pytest.raises(
            PairLost, match=r"\A(no connection within 0\.6 s: the ports .*|the other side's port refuses connections)\Z"
        ):
            make_pair(SERVER, host, lambda _: elsewhere, 0.6)
        assert time.monotonic() - began < 2.9  # Gloo itself would wait five times as long as it is told to


def _unused_port() -> int:
    with socket.create_server(("127.0.0.2", 0)) as sock:
        return sock.getsockname()[1]


def test_the_error_of_the_exchange_is_raised_as_it_is() -> None:
    for error in (ValueError("refused"), RuntimeError("lost")):

        def exchange(_: Address, error: Exception = error) -> Address:
            raise error

        with pytest.raises(type(error), match=rf"\A{error}\Z"):
            make_pair(WORKER, "127.0.0.1", exchange, 1.0)


def test_a_host_that_is_not_this_machine_is_an_error_with_its_name() -> None:
    for host in ("nowhere.invalid", "192.0.2.1"):
        with pytest.raises(PairLost, match=rf"\ACannot resolve {host} to a \(local\) address\Z"):
            make_pair(SERVER, host, lambda own: own, 1.0)


def test_sides_of_different_kinds_of_addresses_are_refused() -> None:
    with pytest.raises(PairLost, match=r"\A127\.0\.0\.1 and ::1 are addresses of different kinds \(IPv4 and IPv6\)\Z"):
        make_pair(SERVER, "127.0.0.1", lambda _: replace(SOMEBODY, host="::1"), 1.0)


def test_a_stranger_that_connects_first_is_not_taken_for_the_other_side() -> None:
    with process() as (_, pipe):

        def exchange(own: Address) -> Address:
            other = received(pipe)
            pipe.send(replace(own, token="0" * 2 * TOKEN_BYTES))  # so it sends another token than it was told
            return other

        with pytest.raises(PairLost, match=r"\Aanother process than the one that was meant has connected\Z"):
            make_pair(SERVER, "127.0.0.1", exchange, PATIENCE_SECONDS)


def test_a_stranger_at_the_ports_of_a_pair_that_is_connected_changes_nothing() -> None:
    """Rubbish, and what Gloo's own sockets begin with: the number of a connection, and a message that is too large."""
    addresses: list[Address] = []

    def noted(exchange: Callable[[Address], Address], own: Address) -> Address:
        addresses.extend([own, other := exchange(own)])
        return other

    too_large = struct.pack("=6Q", 48 + (1 << 20), 1, 0, 0, 1 << 20, 0) + bytes(4096)
    with process() as (_, pipe), ExitStack() as strangers:
        pair = make_pair(SERVER, "127.0.0.1", lambda own: noted(exchange_over(pipe), own), PATIENCE_SECONDS)
        assert received(pipe) == "made"
        for address in addresses:
            for said in (b"", b"GET / HTTP/1.0\r\n\r\n" * 50, *(struct.pack("=q", number) + too_large for number in range(8))):
                stranger = strangers.enter_context(socket.create_connection((address.host, address.port), timeout=5))
                with suppress(OSError):  # Gloo may have closed it
                    stranger.sendall(said)
        for _ in range(3):
            assert answered(pair, numbers()).equal(numbers() + 1)
        pair.close()


SOMEBODY = Address(host="127.0.0.2", port=9, token="ab" * TOKEN_BYTES)


def test_an_address_crosses_as_json() -> None:
    assert Address.parse(vars(SOMEBODY)) == SOMEBODY


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "expected: host, port, token"),
        ({**vars(SOMEBODY), "host": 1}, "expected: host, port, token"),
        ({**vars(SOMEBODY), "port": 0}, "expected: host, port, token"),
        ({**vars(SOMEBODY), "port": 65536}, "expected: host, port, token"),
        ({**vars(SOMEBODY), "port": True}, "expected: host, port, token"),
        ({**vars(SOMEBODY), "token": "ab"}, "token: expected 32 hexadecimal digits"),
        ({**vars(SOMEBODY), "token": "xy" * TOKEN_BYTES}, "token: expected 32 hexadecimal digits"),
        ({**vars(SOMEBODY), "host": "localhost"}, "host: got 'localhost', expected an address in digits"),
        ({**vars(SOMEBODY), "host": "\0" * 1000}, "expected an address in digits"),
    ],
)
def test_anything_but_an_address_is_refused(value: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Address.parse(value)
