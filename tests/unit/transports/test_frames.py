"""Frames over real connections: cut anywhere, slow, broken off in the middle, or to a peer that has ended."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ormo_rpc.errors import PushRefused
from ormo_rpc.messages import ErrorReply, Reply, no_buffers
from ormo_rpc.transports.pending_replies import LIVENESS_SECONDS
from ormo_rpc.transports.stream import frames
from ormo_rpc.transports.stream.client import StreamClient
from ormo_rpc.transports.stream.frames import DTYPES, INLINE, REQUEST_BYTES, SAME, FrameSocket, bytes_of
from ormo_rpc.transports.stream.server import StreamServerSide
from tests.support.processes import PATIENCE_SECONDS

LARGE = 5 << 20
SOON_SECONDS = 10.0
"""Long after a look, and long before a test's time is over."""


@contextmanager
def connected(buffers: int | None = None) -> Generator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection over loopback, with small buffers in the system if so asked."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        if buffers is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffers)
        here = socket.socket()
        if buffers is not None:
            here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffers)
        here.connect(listener.getsockname())
        there, _ = listener.accept()
    with here, there:
        yield here, there


def always() -> bool:
    return True


def chance(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))


def sending(stream: FrameSocket) -> Callable[[], None]:
    return lambda: stream.send(b"x", bytes_of(chance(LARGE)))


def receiving(stream: FrameSocket) -> Callable[[], None]:
    return lambda: stream.receive(memoryview(bytearray(10_000)))


def gone_after(looks: int) -> Callable[[], bool]:
    """Make an ``alive`` that is true that many times."""
    asked = iter(range(1_000_000))
    return lambda: next(asked) < looks


def test_a_vector_sent_in_many_parts_arrives_whole() -> None:
    vector = chance(LARGE)
    frame = bytes(range(72))
    with connected(buffers=4096) as (here, there), ThreadPoolExecutor(1) as elsewhere:
        sent: list[int] = []

        class Counted:
            """The connection, counting its parts."""

            def __getattr__(self, name: str) -> object:
                return getattr(here, name)

            def sendmsg(self, parts: list[memoryview]) -> int:
                """As `socket.sendmsg`, but at most 100,001 bytes at a time, which ends frames anywhere."""
                sent.append(here.sendmsg([memoryview(b"".join(parts))[:100_001]]))
                return sent[-1]

        stream = FrameSocket(Counted(), always)  # pyright: ignore[reportArgumentType] # as good as a socket
        sending = elsewhere.submit(stream.send, frame, bytes_of(vector))
        came, got = bytearray(72), torch.empty(LARGE, dtype=torch.uint8)
        receiver = FrameSocket(there, always)
        receiver.receive(memoryview(came))
        receiver.receive(bytes_of(got))
        sending.result(PATIENCE_SECONDS)
    assert len(sent) > 50
    assert sum(sent) == 72 + LARGE
    assert bytes(came) == frame
    assert torch.equal(got, vector)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vector_of_any_dtype_crosses_to_the_bit_with_small_buffers(dtype: torch.dtype) -> None:
    vector = chance(1 << 20).view(dtype)  # NaN of every kind among them
    with connected(buffers=4096) as (here, there), ThreadPoolExecutor(1) as elsewhere:
        sending = elsewhere.submit(FrameSocket(here, always).send, b"x", bytes_of(vector))
        got = torch.empty_like(vector)
        receiver = FrameSocket(there, always)
        receiver.receive(memoryview(bytearray(1)))
        receiver.receive(bytes_of(got))
        sending.result(PATIENCE_SECONDS)
    assert torch.equal(got.view(torch.uint8), vector.view(torch.uint8))


def test_frames_that_arrive_byte_by_byte_are_whole_and_end_where_they_end() -> None:
    with connected() as (here, there), ThreadPoolExecutor(1) as elsewhere:
        here.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        receiver = FrameSocket(there, always)

        def two() -> list[bytes]:
            both = [bytearray(REQUEST_BYTES), bytearray(REQUEST_BYTES)]
            for each in both:
                receiver.receive(memoryview(each))
            return [bytes(each) for each in both]

        receiving = elsewhere.submit(two)
        first, second = bytes(range(REQUEST_BYTES)), bytes(range(100, 100 + REQUEST_BYTES))
        for byte in first + second:
            here.sendall(bytes([byte]))
        assert receiving.result(PATIENCE_SECONDS) == [first, second]


@pytest.mark.parametrize("sent", [0, 1, 55])
def test_a_connection_that_ends_in_the_middle_of_a_frame_is_an_end(sent: int) -> None:
    with connected() as (here, there):
        here.sendall(bytes(sent))
        here.shutdown(socket.SHUT_WR)
        with pytest.raises(EOFError, match=r"\Athe connection has ended\Z"):
            FrameSocket(there, always).receive(memoryview(bytearray(REQUEST_BYTES)))


def test_a_connection_that_is_reset_is_an_end_for_both_directions() -> None:
    with connected() as (here, there):
        stream = FrameSocket(there, always)
        here.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close is a reset
        here.close()
        with pytest.raises(EOFError, match=r"\Athe connection has ended: .*reset.*\Z"):
            stream.receive(memoryview(bytearray(1)))
        with pytest.raises(EOFError, match=r"\Athe connection has ended: .*pipe.*\Z"):
            stream.send(b"x")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["says nothing", "stops in the middle", "does not read"])
def test_a_stalled_peer_is_given_up_as_soon_as_it_is_not_alive(what: str) -> None:
    with connected(buffers=4096) as (here, there):
        stream = FrameSocket(there, gone_after(1))
        began = time.monotonic()
        if what == "stops in the middle":
            here.sendall(b"x" * 30)
        call = sending(stream) if what == "does not read" else receiving(stream)
        with pytest.raises(EOFError, match=r"\Athe other side is not alive\Z"):
            call()
        # Two looks, a second each, where the first one found it alive.
        assert 1.5 * frames.LIVENESS_SECONDS < time.monotonic() - began < SOON_SECONDS


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["gives", "takes"])
def test_a_peer_that_sends_byte_by_byte_is_given_up_as_well(direction: str) -> None:
    """A byte now and then is not a sign of life: else a worker that was evicted keeps its stream for ever."""
    with connected(buffers=4096) as (here, there):
        ended = threading.Event()

        def trickle() -> None:
            while not ended.wait(0.2):
                try:
                    if direction == "gives":
                        here.sendall(b"x")
                    else:
                        here.recv(20_000)
                except OSError:
                    return

        trickling = threading.Thread(target=trickle, daemon=True)
        trickling.start()
        stream = FrameSocket(there, gone_after(0))
        call = receiving(stream) if direction == "gives" else sending(stream)
        try:
            with pytest.raises(EOFError, match=r"\Athe other side is not alive\Z"):
                call()
        finally:
            ended.set()
            trickling.join(PATIENCE_SECONDS)


@pytest.mark.slow
def test_a_peer_that_is_alive_is_waited_for() -> None:
    with connected(buffers=4096) as (here, there), ThreadPoolExecutor(1) as elsewhere:
        looks: list[float] = []

        def alive() -> bool:
            looks.append(time.monotonic())
            if len(looks) == 2:
                here.sendall(b"here")
            return True

        got = bytearray(4)
        elsewhere.submit(FrameSocket(there, alive).receive, memoryview(got)).result(PATIENCE_SECONDS)
        assert got == b"here"
        assert len(looks) == 2


def exact(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def reply(ticket: int | None, params: Tensor, buffers: Tensor) -> Reply:
    return Reply(worker=1, ticket=ticket, stamp=3, params=params, lr=0.5, steps=1, incarnation=0, buffers=buffers)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_every_reply_of_a_stream_has_the_buffers_that_it_was_sent_with(data: st.DataObject) -> None:
    """Replies may share buffers, by which they cross once, and may have none; one without a ticket has none."""
    pool = [exact(each) for each in data.draw(st.lists(st.binary(max_size=300), min_size=1, max_size=3))] + [no_buffers()]
    with connected() as (here, there):
        server, side, sent = FrameSocket(here, always), StreamServerSide(share=False), no_buffers()
        client = StreamClient(FrameSocket(there, always), torch.zeros(0, dtype=torch.uint8), None)
        came: list[tuple[Reply, bytes]] = []
        for number in range(data.draw(st.integers(1, 8))):
            kind = data.draw(st.sampled_from(["reply", "reply", "end", "error"]))
            params, buffers = torch.arange(float(data.draw(st.integers(0, 3)))) + number, data.draw(st.sampled_from(pool))
            response = reply(None if kind == "end" else number, params, buffers)
            refused = ErrorReply(error="PushRefused", text="why")
            sent = side._send(server, refused if kind == "error" else response, sent, shared=False)  # pyright: ignore[reportPrivateUsage] # all that a connection's thread does with a response
            if kind == "error":
                with pytest.raises(PushRefused, match=r"\Awhy\Z"):
                    client.register()
                continue
            got = client.register()
            assert torch.equal(got.params, torch.empty(0) if kind == "end" else params)
            came.append((got, b"" if kind == "end" else bytes_of(buffers).tobytes()))
        # Those of earlier replies are still what they were: nothing is written into the same memory.
        assert [bytes_of(each.buffers).tobytes() for each, _ in came] == [expected for _, expected in came]


@given(st.binary(max_size=64), st.booleans(), st.booleans())
def test_a_frame_says_how_many_bytes_of_buffers_follow(data: bytes, ends: bool, same: bool) -> None:
    frame = frames.reply_frame(reply(None if ends else 0, torch.ones(2), exact(data)), INLINE, same_buffers=same)
    assert frames.read_response(bytearray(frame))[-1] == (0 if ends else SAME if same else len(data))


def test_buffers_that_do_not_change_cross_once() -> None:
    """A mask of a megabyte is no part of the cost of each push."""
    mask = exact(bytes(1 << 20))
    with connected() as (here, there), ThreadPoolExecutor(1) as elsewhere:
        side, client = StreamServerSide(share=False), StreamClient(FrameSocket(there, always), torch.zeros(0).byte(), None)

        def serve() -> list[Tensor]:
            sent = [no_buffers()]
            for ticket in range(3):
                sent.append(side._send(FrameSocket(here, always), reply(ticket, torch.ones(1), mask), sent[-1], shared=False))  # pyright: ignore[reportPrivateUsage] # as above
            return sent

        serving = elsewhere.submit(serve)
        first, second, third = (client.register() for _ in range(3))
        assert torch.equal(first.buffers, mask)
        assert second.buffers is first.buffers
        assert third.buffers is first.buffers
        assert all(each is mask for each in serving.result(SOON_SECONDS)[1:])


@pytest.mark.parametrize("how", ["sends", "ends"])
def test_what_an_evicted_worker_reads_is_kept_until_it_sends_or_ends(how: str) -> None:
    with connected(buffers=4096) as (here, there), ThreadPoolExecutor(1) as elsewhere:
        waiting = elsewhere.submit(FrameSocket(here, lambda: False).wait)
        with pytest.raises(TimeoutError):
            waiting.result(1.5 * LIVENESS_SECONDS)  # longer than the time-out of the connection
        if how == "sends":
            there.sendall(b"x")
        else:
            there.shutdown(socket.SHUT_RDWR)
        waiting.result(PATIENCE_SECONDS)
