"""Workers that violate the stream protocol: random bytes, half frames, forged pushes, false handles; no other one is harmed."""

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


class HostileWorker:
    """A worker that has joined, and sends arbitrary bytes.

    Args:
        run: The cluster that it has joined.
        segment: The handle that it claims.
        first_line: Sent in place of the line with its session id.
    """

    def __init__(self, run: Cluster, *, segment: object = None, first_line: bytes | None = None) -> None:
        session_id = run.workers[2].endpoint.session_id
        self.sock = socket.create_connection(run.address, PATIENCE_SECONDS)
        self.reader = wire.LineReader(self.sock)
        wire.authenticate_server(self.reader, SECRET, {"stream": True}, PATIENCE_SECONDS)
        if first_line is not None:
            self.offer = {}
            self.send(first_line)
            return
        wire.send(self.sock, {"session_id": session_id, "segment": segment, "size": run.service.push_format.size})
        self.offer = self.reader.receive(PATIENCE_SECONDS, 1 << 16)

    def begin(self, shared: object = False) -> HostileWorker:
        """Finish the negotiation, so that frames begin."""
        wire.send(self.sock, {"shared": shared})
        assert self.reader.receive(PATIENCE_SECONDS, 1 << 16) == {"frames": True}
        return self

    def send(self, data: bytes) -> None:
        """Send bytes, as far as the server takes them."""
        try:
            self.sock.sendall(data)
        except OSError:
            return

    def read_to_end(self) -> bytes:
        """Return all bytes that come, to the end of the connection."""
        parts: list[bytes] = []
        try:
            while part := self.sock.recv(1 << 16):
                parts.append(part)
        except ConnectionError:  # closed with unread bytes of this side
            pass
        return b"".join(parts)


def memory(size: int) -> tuple[SharedMemoryPool, dict[str, Any]]:
    """A segment and its handle."""
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
    """A frame of an unknown kind."""
    return struct.pack("<q", kind) + random.Random(kind).randbytes(frames.REQUEST_BYTES - 8)


VIOLATIONS: dict[str, Callable[[Cluster], HostileWorker]] = {}


def violation(make: Callable[[Cluster], HostileWorker]) -> Callable[[Cluster], HostileWorker]:
    """Register a violation under its name."""
    VIOLATIONS[make.__name__] = make
    return make


@violation
def random_bytes(run: Cluster) -> HostileWorker:
    hostile = HostileWorker(run).begin()
    hostile.send(random.Random(6).randbytes(50_000))
    return hostile


@violation
def unknown_request(run: Cluster) -> HostileWorker:
    hostile = HostileWorker(run).begin()
    hostile.send(request(99))
    return hostile


@violation
def request_of_64_bits(run: Cluster) -> HostileWorker:
    hostile = HostileWorker(run).begin()
    hostile.send(request(-(2**63)))
    return hostile


@violation
def giant_first_line(run: Cluster) -> HostileWorker:
    return HostileWorker(run, first_line=b'{"session_id": "' + b"x" * (8 << 20) + b'"}\n')


@violation
def deep_first_line(run: Cluster) -> HostileWorker:
    return HostileWorker(run, first_line=b'{"session_id": ' + b"[" * 3000 + b"\n")


@violation
def first_line_of_another_type(run: Cluster) -> HostileWorker:
    return HostileWorker(run, first_line=b'["session_id"]\n')


@violation
def session_id_of_another_type(run: Cluster) -> HostileWorker:
    return HostileWorker(run, first_line=b'{"session_id": {"a": 1}, "segment": null}\n')


@violation
def http(run: Cluster) -> HostileWorker:
    return HostileWorker(run, first_line=b"GET / HTTP/1.0\r\n\r\n")


@violation
def malformed_answer_to_the_offer(run: Cluster) -> HostileWorker:
    hostile = HostileWorker(run)
    hostile.send(b"\xff\xfe\n")
    return hostile


@violation
def half_a_frame(run: Cluster) -> HostileWorker:
    hostile = HostileWorker(run).begin()
    hostile.send(push_frame()[:30])
    hostile.sock.shutdown(socket.SHUT_WR)
    return hostile


@violation
def half_a_payload(run: Cluster) -> HostileWorker:
    hostile = HostileWorker(run).begin()
    hostile.send(push_frame() + bytes(1000))
    hostile.sock.shutdown(socket.SHUT_WR)
    return hostile


@violation
def shared_though_nothing_was_offered(run: Cluster) -> HostileWorker:
    hostile = HostileWorker(run).begin(shared=True)
    hostile.send(push_frame())  # without the bytes, which are still waited for
    hostile.sock.shutdown(socket.SHUT_WR)
    return hostile


@pytest.mark.parametrize("what", VIOLATIONS)
def test_a_worker_that_violates_the_stream_protocol_harms_no_other(what: str, caplog: pytest.LogCaptureFixture) -> None:
    with cluster() as run:
        run.start(SHARED, TCP, TCP)
        run.run(6, random.Random(1))
        with run.service.lock:
            before = run.server.state_dict(replies=True)
        hostile = VIOLATIONS[what](run)
        with hostile.sock:
            hostile.read_to_end()  # to its end: the stream is closed by the server
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
        hostile = HostileWorker(run).begin()
        frame = bytearray(frames.RESPONSE_BYTES)
        with hostile.sock:
            stream = frames.FrameSocket(hostile.sock, lambda: True)
            for forged in (
                *(push_frame(ticket=number) for number in (-1, 10**6, 2**53, 2**63 - 1, -(2**63))),
                *(push_frame(stamp=number) for number in (-1, 2**63 - 1)),
                *(push_frame(samples=number) for number in (0, -5, 2**63 - 1)),
            ):
                stream.send(forged, bytes_of(torch.ones(SMALL)))
                stream.receive(memoryview(frame))
                kind, _, elements, descriptor, _ = frames.read_response(frame)
                assert (kind, descriptor) == (frames.Response.error, frames.INLINE)
                text = bytearray(elements)
                stream.receive(memoryview(text))
                assert b'"PushRefused"' in text
        run.check_same_state()
        run.run(10, random.Random(2))


@pytest.mark.skipif(not AVAILABLE, reason="this system has no memfd_create")
def test_with_a_journal_a_worker_cannot_change_a_validated_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the record is torn, and all acknowledged pushes behind it are lost."""
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


@pytest.mark.skipif(not AVAILABLE, reason="this system has no memfd_create")
def test_a_worker_cannot_change_the_buffers_of_a_push_that_has_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a number of calls that was validated could end the commit halfway, with the gradient applied."""
    with cluster(dimension=SMALL, buffers=True) as run:
        run.start(*[SHARED] * WORKERS)
        push, region = run.service.push, run.service.push_format.buffer_region
        means: list[list[float]] = []

        def pushed(session_id: str, pushed: Push) -> Any:
            region.of(run.workers[pushed.worker].payload.view(torch.uint8)).fill_(255)  # the mean is NaN then
            means.extend(value.tolist() for value in pushed.buffers.values())
            return push(session_id, pushed)

        monkeypatch.setattr(run.service, "push", pushed)
        run.run(12, random.Random(2))
        run.check_same_state()
        assert len(means) == 12
        assert all(math.isfinite(value) for mean in means for value in mean)


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
        "an odd offset": {"pid": own, "name": "x", "descriptor": 1, "offset": 3},
        "an offset before it": {"pid": own, "name": "x", "descriptor": 1, "offset": -64},
        "a huge offset": {"pid": own, "name": "x", "descriptor": 1, "offset": 64 << 60},
        "an offset of text": {"pid": own, "name": "x", "descriptor": 1, "offset": "64"},
        "a name with zeros": {"pid": own, "name": "\0\ud800/", "descriptor": 1},
    }


@pytest.mark.parametrize("what", wrong_segments())
def test_a_false_handle_of_a_segment_is_not_attached(what: str) -> None:
    with cluster(dimension=SMALL) as run:
        run.start(SHARED, TCP, TCP)
        hostile = HostileWorker(run, segment=wrong_segments()[what])
        with hostile.sock:
            assert hostile.offer["segment"] is None
            said = r"\A(the worker has no memory that could be shared|another machine: no shared memory|no shared memory: .*)\Z"
            assert re.match(said, hostile.offer["reason"]) or "offset" in what
        run.run(10, random.Random(2))


@pytest.mark.skipif(not AVAILABLE, reason="this system has no memfd_create")
def test_a_segment_that_is_too_small_is_not_attached_and_a_larger_one_is() -> None:
    """One that is too small is not attached; of a larger one the first bytes count."""
    with cluster(dimension=SMALL) as run:
        run.start(SHARED, TCP, TCP)
        segments, handle = memory(4 * SMALL - 1)
        hostile = HostileWorker(run, segment=handle)
        assert hostile.offer["segment"] is None
        assert str(hostile.offer["reason"]).endswith("is too small, or its size can change")
        hostile.sock.close()
        larger, handle = memory(1 << 20)
        hostile = HostileWorker(run, segment={**handle, "offset": 64})
        assert hostile.offer["segment"] is not None
        hostile.begin(shared=True)
        hostile.send(push_frame(ticket=12345))
        frame = bytearray(frames.RESPONSE_BYTES)
        frames.FrameSocket(hostile.sock, lambda: True).receive(memoryview(frame))
        assert frames.read_response(frame)[0] == frames.Response.error
        hostile.sock.close()
        run.check_same_state()
        run.run(10, random.Random(2))
        del segments, larger
