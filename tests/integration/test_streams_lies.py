"""Workers that lie to a stream: random bytes, half frames, forged pushes, false descriptions of memory; nobody is harmed."""

from __future__ import annotations

import math
import os
import random
import re
import socket
import struct
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from ormo_rpc import build_server
from ormo_rpc.messages import Push
from ormo_rpc.rendezvous import protocol as wire
from ormo_rpc.storage.journal import FileJournal, recover
from ormo_rpc.transports.stream import frames
from ormo_rpc.transports.stream.frames import Request, bytes_of
from ormo_rpc.transports.stream.shared_memory import AVAILABLE, SharedMemoryPool
from tests.support.contract import same
from tests.support.processes import PATIENCE_SECONDS
from tests.support.schedule import normal
from tests.support.stream_peers import SECRET, SHARED, SMALL, TCP, WORKERS, Cluster, cluster


class Liar:
    """Somebody who was let in, and says what it likes.

    Args:
        run: Whom it is in.
        segment: What it says of its memory.
        greeting: In place of the line with its session_id.
    """

    def __init__(self, run: Cluster, *, segment: object = None, greeting: bytes | None = None) -> None:
        session_id = run.workers[2].lease.join_response.session_id
        self.sock = socket.create_connection(run.address, PATIENCE_SECONDS)
        self.reader = wire.LineReader(self.sock)
        wire.authenticate_server(self.reader, SECRET, {"stream": True}, PATIENCE_SECONDS)
        if greeting is not None:
            self.offer = {}
            self.say(greeting)
            return
        wire.send(self.sock, {"session_id": session_id, "segment": segment})
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


def memory(size: int) -> tuple[SharedMemoryPool, dict[str, Any]]:
    """A segment and how it is described."""
    segments = SharedMemoryPool()
    vector = segments.vector(size)
    segments.kept = vector  # pyright: ignore[reportAttributeAccessIssue] # with them, so that it lives as long
    handle = segments.handle(vector)
    assert handle is not None
    return segments, asdict(handle)


def push_frame(ticket: int = 0, stamp: int = 0, samples: int = 1, loss: float = 0.0) -> bytes:
    push = Push(worker=2, ticket=ticket, stamp=stamp, grad=torch.empty(0), samples=samples, loss=loss)
    return frames.request(Request.push, push)


def request(kind: int) -> bytes:
    """A frame of a kind that is none."""
    return struct.pack("<q", kind) + random.Random(kind).randbytes(frames.REQUEST_BYTES - 8)


LIES: dict[str, Callable[[Cluster], Liar]] = {}


def lie(make: Callable[[Cluster], Liar]) -> Callable[[Cluster], Liar]:
    """Count it among the lies."""
    LIES[make.__name__] = make
    return make


@lie
def random_bytes(run: Cluster) -> Liar:
    liar = Liar(run).begin()
    liar.say(random.Random(6).randbytes(50_000))
    return liar


@lie
def unknown_word(run: Cluster) -> Liar:
    liar = Liar(run).begin()
    liar.say(request(99))
    return liar


@lie
def word_of_64_bits(run: Cluster) -> Liar:
    liar = Liar(run).begin()
    liar.say(request(-(2**63)))
    return liar


@lie
def giant_greeting(run: Cluster) -> Liar:
    return Liar(run, greeting=b'{"session_id": "' + b"x" * (8 << 20) + b'"}\n')


@lie
def deep_greeting(run: Cluster) -> Liar:
    return Liar(run, greeting=b'{"session_id": ' + b"[" * 3000 + b"\n")


@lie
def greeting_of_another_kind(run: Cluster) -> Liar:
    return Liar(run, greeting=b'["session_id"]\n')


@lie
def token_of_another_kind(run: Cluster) -> Liar:
    return Liar(run, greeting=b'{"session_id": {"a": 1}, "segment": null}\n')


@lie
def http(run: Cluster) -> Liar:
    return Liar(run, greeting=b"GET / HTTP/1.0\r\n\r\n")


@lie
def no_answer_to_the_offer(run: Cluster) -> Liar:
    liar = Liar(run)
    liar.say(b"\xff\xfe\n")
    return liar


@lie
def half_a_frame(run: Cluster) -> Liar:
    liar = Liar(run).begin()
    liar.say(push_frame()[:30])
    liar.sock.shutdown(socket.SHUT_WR)
    return liar


@lie
def half_a_payload(run: Cluster) -> Liar:
    liar = Liar(run).begin()
    liar.say(push_frame() + bytes(1000))
    liar.sock.shutdown(socket.SHUT_WR)
    return liar


@lie
def shared_though_nothing_was_offered(run: Cluster) -> Liar:
    liar = Liar(run).begin(shared=True)
    liar.say(push_frame())  # without the bytes, which are still waited for
    liar.sock.shutdown(socket.SHUT_WR)
    return liar


@pytest.mark.parametrize("what", LIES)
def test_a_worker_that_violates_the_stream_protocol_harms_no_other(what: str, caplog: pytest.LogCaptureFixture) -> None:
    with cluster() as run:
        run.start(SHARED, TCP, TCP)
        run.run(6, random.Random(1))
        with run.service.lock:
            before = run.server.state_dict(replies=True)
        liar = LIES[what](run)
        with liar.sock:
            liar.heard()  # to its end: the stream is closed by the server
        with run.service.lock:
            assert same(run.server.state_dict(replies=True), before)
        run.run(20, random.Random(2), among=(0, 1))
        assert run.pushed == 26
        assert run.service.evictions == []
    assert "Traceback" not in caplog.text


def test_each_forged_push_is_refused_and_the_stream_continues() -> None:
    with cluster(dimension=SMALL) as run:
        run.start(SHARED, TCP, TCP)
        run.run(6, random.Random(1))
        liar = Liar(run).begin()
        frame = bytearray(frames.RESPONSE_BYTES)
        with liar.sock:
            stream = frames.FrameSocket(liar.sock, lambda: True)
            for forged in (
                *(push_frame(ticket=number) for number in (-1, 10**6, 2**53, 2**63 - 1, -(2**63))),
                *(push_frame(stamp=number) for number in (-1, 2**63 - 1)),
                *(push_frame(samples=number) for number in (0, -5, 2**63 - 1)),
            ):
                stream.send(forged, bytes_of(torch.ones(SMALL)))
                stream.receive(memoryview(frame))
                kind, _, elements, descriptor = frames.read_response(frame)
                assert (kind, descriptor) == (frames.Response.error, frames.INLINE)
                text = bytearray(elements)
                stream.receive(memoryview(text))
                assert b'"PushRefused"' in text
        run.check_same_state()
        run.run(10, random.Random(2))


@pytest.mark.skipif(not AVAILABLE, reason="this system has no memfd_create")
def test_with_a_journal_a_worker_cannot_change_a_validated_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the record of a worker that lies is torn, and all that others were acknowledged behind it is lost."""
    journal = FileJournal(tmp_path)
    with cluster(dimension=SMALL, journal=journal) as run:
        run.start(*[SHARED] * WORKERS)
        push = run.service.push

        def pushed(session_id: str, pushed: Push) -> Any:
            run.workers[0].payload.fill_(math.nan)  # after it was pushed, and before it is validated
            return push(session_id, pushed)

        monkeypatch.setattr(run.service, "push", pushed)
        run.run(12, random.Random(2))
        run.check_same_state()
        again = build_server(
            algorithm="ormo",
            lr=lambda t: 0.01 / (1 + t),
            momentum=0.9,
            params=normal(SMALL, 7, 0).float(),
            num_workers=WORKERS,
        )
        assert recover(tmp_path, 0, again) == 1 + 12  # the start, and every push
        assert torch.equal(again.params, run.reference.params)
    journal.close()


def wrong_segments() -> dict[str, object]:
    """Values that are no handle of a segment, and handles of other segments."""
    own = os.getpid()
    return {
        "a list": [own, "x", 3],
        "a number": 5,
        "nothing in it": {},
        "a name that is none": {"pid": own, "name": 5, "descriptor": 3},
        "true": {"pid": True, "name": "x", "descriptor": True},
        "a fraction": {"pid": 1.5, "name": "x", "descriptor": 3},
        "a path": {"pid": own, "name": "x", "descriptor": "../maps"},
        "nobody": {"pid": 2**31 - 1, "name": "x", "descriptor": 3},
        "negative": {"pid": -1, "name": "x", "descriptor": -1},
        "huge": {"pid": 10**400, "name": "x", "descriptor": 10**400},
        "init": {"pid": 1, "name": "x", "descriptor": 0},
        "standard output": {"pid": own, "name": "x", "descriptor": 1},
        "a name with zeros": {"pid": own, "name": "\0\ud800/", "descriptor": 1},
    }


@pytest.mark.parametrize("what", wrong_segments())
def test_a_false_handle_of_a_segment_is_not_attached(what: str) -> None:
    with cluster(dimension=SMALL) as run:
        run.start(SHARED, TCP, TCP)
        liar = Liar(run, segment=wrong_segments()[what])
        with liar.sock:
            assert liar.offer["segment"] is None
            assert re.match(r"\A(the worker has no segment|server and worker share no memory: .*)\Z", liar.offer["reason"])
        run.run(10, random.Random(2))


@pytest.mark.skipif(not AVAILABLE, reason="this system has no memfd_create")
def test_a_segment_that_is_too_small_is_not_attached_and_a_larger_one_is() -> None:
    """One that is too small is not shared; of one that is larger the first bytes count."""
    with cluster(dimension=SMALL) as run:
        run.start(SHARED, TCP, TCP)
        segments, described = memory(4 * SMALL - 1)
        liar = Liar(run, segment=described)
        assert liar.offer["segment"] is None
        assert str(liar.offer["reason"]).endswith("is too small, or its size can change")
        liar.sock.close()
        larger, described = memory(1 << 20)
        liar = Liar(run, segment=described)
        assert liar.offer["segment"] is not None
        liar.begin(shared=True)
        liar.say(push_frame(ticket=12345))
        frame = bytearray(frames.RESPONSE_BYTES)
        frames.FrameSocket(liar.sock, lambda: True).receive(memoryview(frame))
        assert frames.read_response(frame)[0] == frames.Response.error
        liar.sock.close()
        run.check_same_state()
        run.run(10, random.Random(2))
        del segments, larger
