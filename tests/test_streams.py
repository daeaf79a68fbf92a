"""Streams over loopback, by shared memory and by TCP: what the service says in process, to the bit, whatever the others do."""

from __future__ import annotations

import errno
import logging
import math
import os
import random
import re
import socket
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ormo_rpc import algorithms, build_server
from ormo_rpc.buffers import RunningBuffers
from ormo_rpc.errors import Dismissed, PushRefused, Rejoin
from ormo_rpc.journal import Journal, replay
from ormo_rpc.kernels import pool
from ormo_rpc.messages import Push, Reply
from ormo_rpc.runtimes.rpc import frames, stream_calls, streams, wire
from ormo_rpc.runtimes.rpc.door import Door
from ormo_rpc.runtimes.rpc.frames import ASK, Ask, bytes_of
from ormo_rpc.runtimes.rpc.lease import Lease, ServerLost, let_in
from ormo_rpc.runtimes.rpc.secret import Secret
from ormo_rpc.runtimes.rpc.segments import AVAILABLE, Origin, Segments
from ormo_rpc.runtimes.rpc.service import Service
from ormo_rpc.runtimes.rpc.stream_calls import StreamCalls
from ormo_rpc.runtimes.rpc.streams import Streams, shared_snapshots
from ormo_rpc.server import ParameterServer
from ormo_rpc.wire_options import Transport
from tests.contract import same
from tests.processes import PATIENCE_SECONDS, wait_until
from tests.schedule import normal

SECRET = Secret("a secret that only we two know")
LARGE = pool.WORTH_POOLING // 4 + 1
"""Elements of float32 from which snapshots lie in pools, and so in shared memory; odd."""
SMALL = 5
WORKERS = 3
SHARED, TCP = Transport.auto, Transport.tcp
BOTH = [pytest.param(SHARED, id="shared", marks=pytest.mark.skipif(not AVAILABLE, reason="no memfd_create")), TCP]


def plain_bytes(size: int) -> Tensor:
    """Memory that is not shared."""
    return torch.zeros(size, dtype=torch.uint8)


class Client:
    """A worker: its lease, its stream, and a thread that waits for its answers."""

    def __init__(self, house: House, number: int, transport: Transport) -> None:
        self.number = number
        self.elsewhere = ThreadPoolExecutor(1)
        self.lease: Lease = let_in(lambda: house.address, SECRET, wanted=number, post="", timeout_seconds=PATIENCE_SECONDS)
        self.segments = None if transport is TCP else Segments()
        allocate = plain_bytes if self.segments is None else self.segments.vector
        dtype = house.server.params.dtype
        self.payload = allocate(house.service.format.size).view(dtype)
        try:
            self.calls = StreamCalls(
                self.lease,
                SECRET,
                self.payload,
                self.segments,
                must_share=transport is Transport.shm,
                timeout_seconds=PATIENCE_SECONDS,
            )
        except BaseException:
            self.lease.__exit__()
            raise

    def hello(self) -> Future[Reply]:
        """Be ready; the answer comes when all are."""
        return self.elsewhere.submit(self.calls.hello)

    def push(self, reply: Reply, payload: Tensor, **other: Any) -> Future[Reply]:
        """Answer a reply."""
        assert reply.ticket is not None
        place: dict[str, Any] = {
            "ticket": reply.ticket,
            "stamp": reply.stamp,
            "incarnation": reply.incarnation,
            "loss": 0.5,
            "samples": 8,
        }
        self.payload.copy_(payload)
        push = Push(worker=self.number, grad=self.payload, **{**place, **other})
        return self.elsewhere.submit(self.calls.push, push, self.payload)

    def close(self) -> None:
        """Be gone."""
        self.lease.__exit__()
        self.calls.__exit__()
        self.elsewhere.shutdown()


class House:
    """A service behind a door, and a twin of its server, in process, that gets the same pushes."""

    def __init__(self, door: Door, service: Service, twin: ParameterServer, segments: Segments | None) -> None:
        self.door = door
        self.address: tuple[str, int] = door.listener.getsockname()[:2]
        self.service = service
        self.server = service.server
        self.twin = twin
        self.segments = segments
        self.clients: list[Client] = []
        self.held: dict[int, tuple[Reply, Reply]] = {}
        """The reply that each worker has: what came by the stream, and what the twin says."""
        self.waiting: dict[int, Future[Reply]] = {}
        self.pushed = 0

    def enter(self, *transports: Transport) -> House:
        """Let workers in, start, and take the first replies."""
        for number, transport in enumerate(transports):
            self.clients.append(Client(self, number, transport))
        self.waiting = {client.number: client.hello() for client in self.clients}
        self.take(self.twin.start())
        return self

    def step(self, worker: int) -> None:
        """A worker pushes what it holds; whoever the twin answers is answered, with the same bits, and nobody else."""
        came, expected = self.held.pop(worker)
        assert came.ticket is not None
        payload = self.gradient(came.ticket)
        self.waiting[worker] = self.clients[worker].push(came, payload)
        statistics = payload[payload.numel() - 2 :] if self.server.buffers.average else payload[:0]
        replies = self.twin.receive(
            Push(
                worker=worker,
                ticket=came.ticket,
                stamp=came.stamp,
                grad=payload[: payload.numel() - statistics.numel()],
                buffers={"mean": statistics} if statistics.numel() else {},
                loss=0.5,
                samples=8,
                incarnation=came.incarnation,
            )
        )
        self.pushed += 1
        applied: int = self.twin.iteration
        wait_until(lambda: applied <= self.server.iteration, "the update")
        self.take(replies)
        for mine, twins in self.held.values():
            assert torch.equal(mine.params, twins.params), "a reply has changed after it was issued"
        assert expected.stamp == came.stamp

    def take(self, replies: list[Reply]) -> None:
        """Take the answers that are due."""
        for expected in replies:
            came = self.waiting.pop(expected.worker).result(PATIENCE_SECONDS)
            assert [getattr(came, name) for name in FACTS] == [getattr(expected, name) for name in FACTS]
            if expected.ticket is not None:
                assert came.params.dtype == expected.params.dtype
                assert torch.equal(came.params, expected.params)
                self.held[expected.worker] = (came, expected)
        assert not [worker for worker, future in self.waiting.items() if future.done()]

    def gradient(self, ticket: int) -> Tensor:
        """What is pushed for a ticket."""
        return 0.1 * normal(self.service.format.size // self.server.params.element_size(), 3, ticket).to(
            self.server.params.dtype
        )

    def go_on(self, steps: int, chance: random.Random, among: tuple[int, ...] = tuple(range(WORKERS))) -> None:
        """That many pushes of workers that have work, in any order."""
        for _ in range(steps):
            able = sorted(worker for worker in self.held if worker in among)
            if not able:
                return
            self.step(chance.choice(able))

    def check_same_state(self) -> None:
        """The server and its twin are one as the other."""
        with self.service.lock:
            assert same(self.server.state_dict(replies=True), self.twin.state_dict(replies=True))


FACTS = ("worker", "ticket", "stamp", "lr", "steps", "incarnation")


@contextmanager
def opened(
    transport: Transport = SHARED,
    *,
    dimension: int = LARGE,
    dtype: torch.dtype = torch.float32,
    workers: int = WORKERS,
    buffers: bool = False,
    max_not_finite: int = 10,
    journal: Journal | None = None,
    **options: Any,
) -> Generator[House]:
    given: dict[str, Any] = {
        "algorithm": "ormo",
        "lr": lambda t: 0.01 / (1 + t),
        "momentum": 0.9,
        "params": normal(dimension, 7, 0).to(dtype),
        **options,
    }

    def server() -> ParameterServer:
        average = {"mean": torch.zeros(2, dtype=dtype)}
        return build_server(num_workers=workers, buffers=RunningBuffers(average, {"mean": 0.25}) if buffers else None, **given)

    twin, ours = server(), server()
    segments = shared_snapshots(ours.rule, transport)
    service = Service(ours, lambda _: None, max_not_finite=max_not_finite, journal=journal)
    serving = Streams(service, transport, segments)
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        welcome = {"config": "", "agent": None, "heartbeat_seconds": 1.0, "patience_seconds": PATIENCE_SECONDS}
        stack.callback(listener.shutdown, socket.SHUT_RDWR)  # wakes the thread that accepts
        door = stack.enter_context(Door(listener, SECRET, service, welcome, PATIENCE_SECONDS, serving.serve))
        house = House(door, service, twin, segments)
        try:
            yield house
        finally:
            for client in house.clients:
                client.close()


def mapping(vector: Tensor) -> str:
    """The line of the system's map of our memory in which a vector lies."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(each, 16) for each in line.split()[0].split("-"))
        if begin <= vector.data_ptr() < end:
            return line
    raise AssertionError("it lies nowhere")


def segments_of(origin: Origin) -> int:
    """How many segments of an origin this process has; a mapping of Python's has a descriptor of its own."""
    files: set[int] = set()
    for each in Path("/proc/self/fd").iterdir():
        try:
            if origin.name in str(each.readlink()):
                files.add(each.stat().st_ino)
        except OSError:  # closed meanwhile, such as that of this very listing
            continue
    return len(files)


# -- the same as in process ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", BOTH)
@pytest.mark.parametrize("rule", algorithms.NAMES)
def test_every_rule_says_by_a_stream_what_it_says_in_process(rule: str, transport: Transport) -> None:
    with opened(algorithm=rule) as house:
        house.enter(*[transport] * WORKERS)
        house.go_on(24, random.Random(rule))
        assert house.pushed == 24
        house.check_same_state()
        came, _ = next(iter(house.held.values()))
        line = mapping(came.params)
        if transport is SHARED:
            assert house.segments is not None
            assert re.search(rf" r--s .*/memfd:{house.segments.origin.name} ", line), line  # which nobody can write to
        else:
            assert "memfd" not in line


@pytest.mark.parametrize("transports", [(SHARED,) * 3, (TCP,) * 3, (SHARED, TCP, SHARED)], ids=["shared", "tcp", "mixed"])
@pytest.mark.parametrize(
    ("scheduler", "options"), [("sync", {}), ("partial", {"k": 2}), ("ssp", {"s": 1})], ids=["sync", "partial", "ssp"]
)
def test_a_barrier_holds_answers_back_and_gives_them_all_at_once(
    scheduler: str, options: dict[str, Any], transports: tuple[Transport, ...]
) -> None:
    with opened(scheduler=scheduler, **options) as house:
        house.enter(*transports)
        house.go_on(30, random.Random(scheduler))
        assert house.pushed == 30
        assert house.server.iteration == 30
        house.check_same_state()


@pytest.mark.parametrize("transport", BOTH)
@pytest.mark.parametrize(
    ("dimension", "dtype", "rule"),
    [
        (LARGE, torch.float64, "ormo"),
        (SMALL, torch.float32, "ormo"),
        (SMALL, torch.float64, "dana"),
        (1, torch.float32, "asgd"),
    ],
    ids=str,
)
def test_other_sizes_and_dtypes_and_batch_norm(dimension: int, dtype: torch.dtype, rule: str, transport: Transport) -> None:
    """What is small comes with the frame, although its gradients are shared; statistics come behind the gradient."""
    with opened(dimension=dimension, dtype=dtype, algorithm=rule, buffers=True) as house:
        house.enter(*[transport] * WORKERS)
        house.go_on(40, random.Random(5))
        house.check_same_state()
        assert house.server.buffers.updates == 40
        shared = "memfd" in mapping(next(iter(house.held.values()))[0].params)
        assert shared == (transport is SHARED and dimension == LARGE)


@pytest.mark.parametrize("transport", BOTH)
def test_a_run_ends_for_all_and_goodbye_is_heard(transport: Transport) -> None:
    with opened(total_tickets=9, dimension=SMALL) as house:
        house.enter(*[transport] * WORKERS)
        house.go_on(9, random.Random(1))
        assert not house.held
        assert house.server.ended
        house.check_same_state()
        for left, client in zip((2, 1, 0), house.clients, strict=True):
            client.calls.goodbye()  # returns when it was heard
            assert len(house.service.seats) == left
        assert house.service.losses == []
        house.clients[0].calls.goodbye()  # to nobody: no error


def test_a_push_that_is_repeated_is_applied_once_and_gets_the_identical_reply() -> None:
    with opened() as house:
        house.enter(SHARED, TCP, SHARED)
        for worker in (0, 1):
            before, _ = house.held[worker]
            house.step(worker)
            answer, _ = house.held[worker]
            assert before.ticket is not None
            again = house.clients[worker].push(before, house.gradient(before.ticket)).result(PATIENCE_SECONDS)
            assert [getattr(again, name) for name in FACTS] == [getattr(answer, name) for name in FACTS]
            assert torch.equal(again.params, house.held[worker][1].params)
        assert house.server.iteration == 2
        house.go_on(10, random.Random(2))


@pytest.mark.parametrize("rule", ["ormo", "dc_asgd", "dana"])
def test_memory_is_used_again_and_never_under_a_reader(rule: str) -> None:
    """K replies are out, w is the next one or one more, and one is written; each rule that sends more has as much for that.

    In `House.step` all replies that are out are compared with the twin's after every push.
    """
    with opened(algorithm=rule) as house:
        house.enter(*[SHARED] * WORKERS)
        house.go_on(240, random.Random(rule))
        assert house.pushed == 240
        assert house.segments is not None
        probe = 1
        assert WORKERS < segments_of(house.segments.origin) - probe <= WORKERS + 2
        for client in house.clients:
            assert client.segments is not None
            assert segments_of(client.segments.origin) == 1


def test_who_is_slow_keeps_its_parameters_while_the_others_go_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "WORTH_POOLING", 0)  # small vectors, too, lie in shared memory
    with opened(dimension=SMALL) as house:
        house.enter(*[SHARED] * WORKERS)
        came, _ = house.held[0]
        bits = came.params.clone()
        for _ in range(5):
            house.go_on(20, random.Random(9), among=(1, 2))
            assert torch.equal(came.params, bits)
        house.step(0)
        assert not torch.equal(house.held[0][0].params, bits)
        house.check_same_state()


# -- refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", BOTH)
def test_refusals_are_what_they_are_in_process_and_change_nothing(
    transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "LOOK_SECONDS", int(PATIENCE_SECONDS))  # the stream is not closed before the push comes
    with opened(max_not_finite=2) as house:
        house.enter(*[transport] * WORKERS)
        house.go_on(5, random.Random(3))
        client, (reply, _) = house.clients[0], house.held[0]
        good = house.gradient(0)
        for other, said in (
            ({"ticket": 77}, r"\Apush of worker 0: ticket: got 77, expected one that was issued, below 8\Z"),
            ({"stamp": 10**6}, r"\Apush of worker 0 for ticket \d+: .*stamp.*"),
            ({"samples": 0}, r"\Apush of worker 0 for ticket \d+: samples: got 0, expected at least 1\Z"),
            ({"ticket": -(2**63)}, r"\Apush: ticket: got a number of 64 bits, expected one of at most 53\Z"),
        ):
            with pytest.raises(PushRefused, match=said) as caught:
                client.push(reply, good, **other).result(PATIENCE_SECONDS)
            assert caught.type is PushRefused
        with pytest.raises(Rejoin, match=r".*incarnation: got 8, expected 0; the server has restarted: rejoin\Z"):
            client.push(reply, good, incarnation=8).result(PATIENCE_SECONDS)
        house.check_same_state()
        house.go_on(5, random.Random(4))

        nan = torch.full_like(good, math.nan)
        answer = client.push(house.held[0][0], nan).result(PATIENCE_SECONDS)
        assert answer.ticket is not None
        said = r"\Aworker 0: 2 gradients in a row were not finite \(runtime\.max_not_finite\)\Z"
        with pytest.raises(Dismissed, match=said):
            client.push(answer, good, loss=math.inf).result(PATIENCE_SECONDS)

        house.service.lost(house.service.seats.by_worker[1], "of this test")
        with pytest.raises(Rejoin, match=r"\Athis worker's seat is taken away: .*; rejoin\Z"):
            house.clients[1].push(house.held[1][0], good).result(PATIENCE_SECONDS)
        with pytest.raises(Rejoin, match=r"\Athis worker's seat is taken away: .*; rejoin\Z"):
            house.clients[1].hello().result(PATIENCE_SECONDS)
        assert house.clients[2].push(house.held[2][0], good).result(PATIENCE_SECONDS).ticket is not None


def test_who_waits_at_a_barrier_is_told_that_it_was_evicted() -> None:
    with opened(scheduler="sync", dimension=SMALL) as house:
        house.enter(SHARED, TCP, TCP)
        house.step(0)
        house.step(1)
        for worker in (0, 1):
            house.service.lost(house.service.seats.by_worker[worker], "of this test")
            with pytest.raises(Rejoin, match=rf"\Aworker {worker} was evicted: of this test; rejoin\Z"):
                house.waiting.pop(worker).result(PATIENCE_SECONDS)


def test_the_stream_of_who_was_evicted_ends_by_itself() -> None:
    with opened(dimension=SMALL) as house:
        house.enter(*[TCP] * WORKERS)
        house.service.lost(house.service.seats.by_worker[0], "of this test")
        with pytest.raises(EOFError):
            house.clients[0].calls._stream.receive(memoryview(bytearray(1)))  # pyright: ignore[reportPrivateUsage] # what is below
        with pytest.raises(ServerLost, match=r"\Athe server is gone: the connection has ended.*\Z"):
            house.clients[0].calls.hello()


@pytest.mark.parametrize("transport", BOTH)
def test_a_worker_that_waits_notices_that_its_lease_is_lost(transport: Transport) -> None:
    with opened(scheduler="sync", dimension=SMALL) as house:
        house.enter(*[transport] * WORKERS)
        house.step(0)
        house.clients[0].lease.lost.set()
        with pytest.raises(ServerLost, match=r"\Athe server is gone: the other side is gone\Z"):
            house.waiting.pop(0).result(10)  # long before the patience of a lease is over


def test_a_door_that_closes_ends_all_streams() -> None:
    with opened(scheduler="sync", dimension=SMALL) as house:
        house.enter(SHARED, TCP, TCP)
        house.step(0)
        house.door.__exit__()
        with pytest.raises(ServerLost, match=r"\Athe server is gone: .*\Z"):
            house.waiting.pop(0).result(PATIENCE_SECONDS)


# -- being let in --------------------------------------------------------------------------------------------------------


def test_without_a_seat_there_is_no_stream(caplog: pytest.LogCaptureFixture) -> None:
    with opened(dimension=SMALL) as house:
        house.enter(*[TCP] * WORKERS)
        lease = house.clients[0].lease
        house.service.lost(house.service.seats.by_worker[0], "of this test")
        with pytest.raises(ServerLost, match=r"\Ano stream to the server: stream: got a token without a seat; rejoin\Z"):
            StreamCalls(lease, SECRET, plain_bytes(4), None, must_share=False, timeout_seconds=PATIENCE_SECONDS)
        wrong = Secret("a secret of somebody else")
        with pytest.raises(wire.Refused, match=r"\Awrong secret\Z"):
            StreamCalls(lease, wrong, plain_bytes(4), None, must_share=False, timeout_seconds=PATIENCE_SECONDS)
        wait_until(lambda: "was not let in: wrong secret" in caplog.text, "the warning")
        house.held.pop(0)
        assert house.clients[1].push(house.held[1][0], house.gradient(0)).result(PATIENCE_SECONDS).ticket is not None


def cannot(origin: Origin, descriptor: int, _size: int) -> Tensor:
    raise FileNotFoundError(f"[Errno 2] No such file or directory: '/proc/{origin.process}/fd/{descriptor}'")


@pytest.mark.skipif(not AVAILABLE, reason="this system has no memfd_create")
@pytest.mark.parametrize(
    ("module", "reason"),
    [(streams, "server and worker share no memory"), (stream_calls, "worker and server share no memory")],
    ids=["the server cannot", "the worker cannot"],
)
def test_where_no_memory_can_be_shared_auto_says_so_and_goes_on_and_shm_gives_up(
    module: Any, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(module, "opened", cannot)
    with opened(Transport.auto) as house:
        house.enter(*[SHARED] * WORKERS)
        house.go_on(6, random.Random(1))
        house.check_same_state()
        assert "memfd" not in mapping(next(iter(house.held.values()))[0].params)
    told = [record for record in caplog.records if "go by TCP" in record.getMessage()]
    assert [record.levelno for record in told] == [logging.INFO] * WORKERS
    said = rf"\Agradients and parameters go by TCP: {reason}: \[Errno 2\] No such file or directory: '/proc/\d+/fd/\d+'\Z"
    assert all(re.match(said, record.getMessage()) for record in told)
    with opened(Transport.shm) as house:
        said = rf"\Awire\.transport=shm: {reason}: .*; expected a worker on the server's machine, or auto or tcp\Z"
        with pytest.raises(wire.Refused, match=said) as caught:
            Client(house, 0, Transport.shm)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("transport", "reason"),
    [(TCP, "wire.transport=tcp"), (Transport.auto, "the server's system has no memory that could be shared")],
    ids=["tcp", "no memfd"],
)
def test_a_server_that_does_not_share_says_why(
    transport: Transport, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    if transport is not TCP:
        monkeypatch.setattr(streams, "AVAILABLE", False)
    with opened(transport, dimension=SMALL) as house:
        house.enter(*[SHARED] * WORKERS)
        house.go_on(6, random.Random(1))
        house.check_same_state()
    told = {record.getMessage() for record in caplog.records if record.levelno == logging.INFO}
    assert f"gradients and parameters go by TCP: {reason}" in told


@pytest.mark.parametrize("when", ["from the start", "in the midst"])
def test_where_descriptors_are_scarce_the_run_goes_on(
    when: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with opened(SHARED) as house:
        if when == "in the midst":
            house.enter(*[SHARED] * WORKERS)
        monkeypatch.setattr("resource.getrlimit", lambda _: (2, 2))
        if when == "from the start":
            house.enter(*[SHARED] * WORKERS)
        house.go_on(12, random.Random(1))
        house.check_same_state()
        places = [mapping(came.params) for came, _ in house.held.values()]
        assert not all("memfd" in place for place in places)
    assert sum("memory is not shared from now on" in record.getMessage() for record in caplog.records) >= 1


def test_a_worker_that_has_too_many_segments_open_lets_them_go(monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[int] = []
    really = stream_calls.opened
    with opened(SHARED) as house:
        house.enter(*[SHARED] * WORKERS)
        (first, *_) = house.clients

        def scarce(origin: Origin, descriptor: int, size: int) -> Tensor:
            if len(first.calls._slots) >= 2:  # pyright: ignore[reportPrivateUsage] # which of them fill the table
                refused.append(descriptor)
                raise OSError(errno.EMFILE, "Too many open files")
            return really(origin, descriptor, size)

        monkeypatch.setattr(stream_calls, "opened", scarce)
        house.go_on(20, random.Random(1), among=(0,))
        house.check_same_state()
    assert refused


def test_memory_is_shared_where_it_must_be() -> None:
    with opened(Transport.shm) as house:
        house.enter(*[Transport.shm] * WORKERS)
        house.go_on(6, random.Random(1))
        house.check_same_state()


# -- who lies ------------------------------------------------------------------------------------------------------------


class Liar:
    """Somebody who was let in, and says what it likes.

    Args:
        house: Whom it is in.
        segment: What it says of its memory.
        greeting: In place of the line with its token.
    """

    def __init__(self, house: House, *, segment: object = None, greeting: bytes | None = None) -> None:
        token = house.clients[2].lease.welcome.token
        self.sock = socket.create_connection(house.address, PATIENCE_SECONDS)
        self.reader = wire.LineReader(self.sock)
        wire.greet_server(self.reader, SECRET, {"stream": True}, PATIENCE_SECONDS)
        if greeting is not None:
            self.offer = {}
            self.say(greeting)
            return
        wire.send(self.sock, {"token": token, "segment": segment})
        self.offer = self.reader.receive(PATIENCE_SECONDS, 1 << 16)

    def begin(self, shared: object = False) -> Liar:
        """Agree on it, so that frames begin."""
        wire.send(self.sock, {"shared": shared})
        assert self.reader.receive(PATIENCE_SECONDS, 1 << 16) == {"frames": True}
        return self

    def say(self, data: bytes) -> None:
        """Send it, as far as it is taken."""
        try:
            self.sock.sendall(data)
        except OSError:
            return

    def heard(self) -> bytes:
        """All that is said, up to the end of the connection."""
        parts: list[bytes] = []
        try:
            while part := self.sock.recv(1 << 16):
                parts.append(part)
        except ConnectionError:  # it is closed while something of ours is unread
            pass
        return b"".join(parts)


def memory(size: int) -> tuple[Segments, dict[str, Any]]:
    """A segment and how it is described."""
    segments = Segments()
    vector = segments.vector(size)
    segments.kept = vector  # pyright: ignore[reportAttributeAccessIssue] # with them, so that it lives as long
    return segments, {**asdict(segments.origin), "descriptor": segments.find(vector)}


def push_frame(ticket: int = 0, stamp: int = 0, samples: int = 1, loss: float = 0.0) -> bytes:
    return ASK.pack(Ask.push, ticket, stamp, 0, samples, 1, loss)


LIES: dict[str, Callable[[House], Liar]] = {}


def lie(make: Callable[[House], Liar]) -> Callable[[House], Liar]:
    """Count it among the lies."""
    LIES[make.__name__] = make
    return make


@lie
def random_bytes(house: House) -> Liar:
    liar = Liar(house).begin()
    liar.say(random.Random(6).randbytes(50_000))
    return liar


@lie
def unknown_word(house: House) -> Liar:
    liar = Liar(house).begin()
    liar.say(ASK.pack(99, 0, 0, 0, 0, 0, 0.0))
    return liar


@lie
def word_of_64_bits(house: House) -> Liar:
    liar = Liar(house).begin()
    liar.say(ASK.pack(-(2**63), *[2**63 - 1] * 5, math.nan))
    return liar


@lie
def giant_greeting(house: House) -> Liar:
    return Liar(house, greeting=b'{"token": "' + b"x" * (8 << 20) + b'"}\n')


@lie
def deep_greeting(house: House) -> Liar:
    return Liar(house, greeting=b'{"token": ' + b"[" * 3000 + b"\n")


@lie
def greeting_of_another_kind(house: House) -> Liar:
    return Liar(house, greeting=b'["token"]\n')


@lie
def token_of_another_kind(house: House) -> Liar:
    return Liar(house, greeting=b'{"token": {"a": 1}, "segment": null}\n')


@lie
def http(house: House) -> Liar:
    return Liar(house, greeting=b"GET / HTTP/1.0\r\n\r\n")


@lie
def no_answer_to_the_offer(house: House) -> Liar:
    liar = Liar(house)
    liar.say(b"\xff\xfe\n")
    return liar


@lie
def half_a_frame(house: House) -> Liar:
    liar = Liar(house).begin()
    liar.say(push_frame()[:30])
    liar.sock.shutdown(socket.SHUT_WR)
    return liar


@lie
def half_a_payload(house: House) -> Liar:
    liar = Liar(house).begin()
    liar.say(push_frame() + bytes(1000))
    liar.sock.shutdown(socket.SHUT_WR)
    return liar


@lie
def shared_though_nothing_was_offered(house: House) -> Liar:
    liar = Liar(house).begin(shared=True)
    liar.say(push_frame())  # without the bytes, which are still waited for
    liar.sock.shutdown(socket.SHUT_WR)
    return liar


@pytest.mark.parametrize("what", LIES)
def test_who_lies_harms_nobody(what: str, caplog: pytest.LogCaptureFixture) -> None:
    with opened() as house:
        house.enter(SHARED, TCP, TCP)
        house.go_on(6, random.Random(1))
        with house.service.lock:
            before = house.server.state_dict(replies=True)
        liar = LIES[what](house)
        with liar.sock:
            liar.heard()  # to its end: the stream is closed by the server
        with house.service.lock:
            assert same(house.server.state_dict(replies=True), before)
        house.go_on(20, random.Random(2), among=(0, 1))
        assert house.pushed == 26
        assert house.service.losses == []
    assert "Traceback" not in caplog.text


def test_pushes_that_are_forged_get_their_refusal_each_and_the_stream_goes_on() -> None:
    with opened(dimension=SMALL) as house:
        house.enter(SHARED, TCP, TCP)
        house.go_on(6, random.Random(1))
        liar = Liar(house).begin()
        frame = bytearray(frames.ANSWER.size)
        with liar.sock:
            stream = frames.Stream(liar.sock, lambda: True)
            for forged in (
                *(push_frame(ticket=number) for number in (-1, 10**6, 2**53, 2**63 - 1, -(2**63))),
                *(push_frame(stamp=number) for number in (-1, 2**63 - 1)),
                *(push_frame(samples=number) for number in (0, -5, 2**63 - 1)),
            ):
                stream.send(forged, bytes_of(torch.ones(SMALL)))
                stream.receive(memoryview(frame))
                word, *_, elements, descriptor = frames.ANSWER.unpack(frame)
                assert (word, descriptor) == (frames.Say.refusal, frames.INLINE)
                text = bytearray(elements)
                stream.receive(memoryview(text))
                assert b'"PushRefused"' in text
        house.check_same_state()
        house.go_on(10, random.Random(2))


@pytest.mark.skipif(not AVAILABLE, reason="this system has no memfd_create")
def test_with_a_journal_nobody_changes_a_gradient_that_was_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the record of a worker that lies is torn, and all that others were acknowledged behind it is lost."""
    journal = Journal(tmp_path)
    with opened(dimension=SMALL, journal=journal) as house:
        house.enter(*[SHARED] * WORKERS)
        receive = house.service.receive

        def received(token: str, *others: Any) -> Any:
            house.clients[0].payload.fill_(math.nan)  # after it was pushed, and before it is looked at
            return receive(token, *others)

        monkeypatch.setattr(house.service, "receive", received)
        house.go_on(12, random.Random(2))
        house.check_same_state()
        again = build_server(
            algorithm="ormo",
            lr=lambda t: 0.01 / (1 + t),
            momentum=0.9,
            params=normal(SMALL, 7, 0).float(),
            num_workers=WORKERS,
        )
        assert replay(tmp_path, 0, again) == 1 + 12  # the start, and every push
        assert torch.equal(again.params, house.twin.params)
    journal.close()


def wrong_segments() -> dict[str, object]:
    """What is no description of a segment, or one of another."""
    own = os.getpid()
    return {
        "a list": [own, "x", 3],
        "a number": 5,
        "nothing in it": {},
        "a name that is none": {"process": own, "name": 5, "descriptor": 3},
        "true": {"process": True, "name": "x", "descriptor": True},
        "a fraction": {"process": 1.5, "name": "x", "descriptor": 3},
        "a path": {"process": own, "name": "x", "descriptor": "../maps"},
        "nobody": {"process": 2**31 - 1, "name": "x", "descriptor": 3},
        "negative": {"process": -1, "name": "x", "descriptor": -1},
        "huge": {"process": 10**400, "name": "x", "descriptor": 10**400},
        "init": {"process": 1, "name": "x", "descriptor": 0},
        "standard output": {"process": own, "name": "x", "descriptor": 1},
        "a name with zeros": {"process": own, "name": "\0\ud800/", "descriptor": 1},
    }


@pytest.mark.parametrize("what", wrong_segments())
def test_a_segment_that_is_none_is_not_shared(what: str) -> None:
    with opened(dimension=SMALL) as house:
        house.enter(SHARED, TCP, TCP)
        liar = Liar(house, segment=wrong_segments()[what])
        with liar.sock:
            assert liar.offer["origin"] is None
            assert re.match(r"\A(the worker has no segment|server and worker share no memory: .*)\Z", liar.offer["reason"])
        house.go_on(10, random.Random(2))


@pytest.mark.skipif(not AVAILABLE, reason="this system has no memfd_create")
def test_segments_of_another_size() -> None:
    """One that is too small is not shared; of one that is larger the first bytes count."""
    with opened(dimension=SMALL) as house:
        house.enter(SHARED, TCP, TCP)
        segments, described = memory(4 * SMALL - 1)
        liar = Liar(house, segment=described)
        assert liar.offer["origin"] is None
        assert str(liar.offer["reason"]).endswith("is too small, or its size can change")
        liar.sock.close()
        larger, described = memory(1 << 20)
        liar = Liar(house, segment=described)
        assert liar.offer["origin"] is not None
        liar.begin(shared=True)
        liar.say(push_frame(ticket=12345))
        frame = bytearray(frames.ANSWER.size)
        frames.Stream(liar.sock, lambda: True).receive(memoryview(frame))
        assert frames.ANSWER.unpack(frame)[0] == frames.Say.refusal
        liar.sock.close()
        house.check_same_state()
        house.go_on(10, random.Random(2))
        del segments, larger
