"""StreamServer that refuse, and streams that end: each worker is told why, and the others go on."""

from __future__ import annotations

import math
import random

import pytest
import torch

from ormo_rpc.compression.wire_options import Transport
from ormo_rpc.errors import PushRefused, Refused, ServerLost, StaleSession, WorkerBanned
from ormo_rpc.rendezvous.secret import Secret
from ormo_rpc.transports.stream import frames
from ormo_rpc.transports.stream.client import StreamClient
from tests.support.processes import PATIENCE_SECONDS, wait_until
from tests.support.stream_peers import BOTH, SECRET, SHARED, SMALL, TCP, WORKERS, attach, plain_bytes


@pytest.mark.parametrize("transport", BOTH)
def test_refusals_are_what_they_are_in_process_and_change_nothing(
    transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "LOOK_SECONDS", int(PATIENCE_SECONDS))  # the stream is not closed before the push comes
    with attach(max_not_finite=2) as house:
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
        with pytest.raises(StaleSession, match=r".*incarnation: got 8, expected 0; the server has restarted: rejoin\Z"):
            client.push(reply, good, incarnation=8).result(PATIENCE_SECONDS)
        house.check_same_state()
        house.go_on(5, random.Random(4))

        nan = torch.full_like(good, math.nan)
        answer = client.push(house.held[0][0], nan).result(PATIENCE_SECONDS)
        assert answer.ticket is not None
        said = r"\Aworker 0: 2 gradients in a row were not finite \(runtime\.max_not_finite\)\Z"
        with pytest.raises(WorkerBanned, match=said):
            client.push(answer, good, loss=math.inf).result(PATIENCE_SECONDS)

        house.service.evict(house.service.memberships.by_worker[1], "of this test")
        with pytest.raises(StaleSession, match=r"\Athis worker's membership is taken away: .*; rejoin\Z"):
            house.clients[1].push(house.held[1][0], good).result(PATIENCE_SECONDS)
        with pytest.raises(StaleSession, match=r"\Athis worker's membership is taken away: .*; rejoin\Z"):
            house.clients[1].register().result(PATIENCE_SECONDS)
        assert house.clients[2].push(house.held[2][0], good).result(PATIENCE_SECONDS).ticket is not None


def test_who_waits_at_a_barrier_is_told_that_it_was_evicted() -> None:
    with attach(scheduler="sync", dimension=SMALL) as house:
        house.enter(SHARED, TCP, TCP)
        house.step(0)
        house.step(1)
        for worker in (0, 1):
            house.service.evict(house.service.memberships.by_worker[worker], "of this test")
            with pytest.raises(StaleSession, match=rf"\Aworker {worker} was evicted: of this test; rejoin\Z"):
                house.waiting.pop(worker).result(PATIENCE_SECONDS)


def test_the_stream_of_who_was_evicted_ends_by_itself() -> None:
    with attach(dimension=SMALL) as house:
        house.enter(*[TCP] * WORKERS)
        house.service.evict(house.service.memberships.by_worker[0], "of this test")
        with pytest.raises(EOFError):
            house.clients[0].calls._stream.receive(memoryview(bytearray(1)))  # pyright: ignore[reportPrivateUsage] # what is below
        with pytest.raises(ServerLost, match=r"\Athe server is gone: the connection has ended.*\Z"):
            house.clients[0].calls.register()


@pytest.mark.parametrize("transport", BOTH)
def test_a_worker_that_waits_notices_that_its_lease_is_lost(transport: Transport) -> None:
    with attach(scheduler="sync", dimension=SMALL) as house:
        house.enter(*[transport] * WORKERS)
        house.step(0)
        house.clients[0].lease.lost.set()
        with pytest.raises(ServerLost, match=r"\Athe server is gone: the other side is gone\Z"):
            house.waiting.pop(0).result(10)  # long before the patience of a lease is over


def test_a_door_that_closes_ends_all_streams() -> None:
    with attach(scheduler="sync", dimension=SMALL) as house:
        house.enter(SHARED, TCP, TCP)
        house.step(0)
        house.door.__exit__()
        with pytest.raises(ServerLost, match=r"\Athe server is gone: .*\Z"):
            house.waiting.pop(0).result(PATIENCE_SECONDS)


def test_without_a_seat_there_is_no_stream(caplog: pytest.LogCaptureFixture) -> None:
    with attach(dimension=SMALL) as house:
        house.enter(*[TCP] * WORKERS)
        lease = house.clients[0].lease
        house.service.evict(house.service.memberships.by_worker[0], "of this test")
        with pytest.raises(
            ServerLost, match=r"\Ano stream to the server: stream: got a session_id without a membership; rejoin\Z"
        ):
            StreamClient(lease, SECRET, plain_bytes(4), None, must_share=False, timeout_seconds=PATIENCE_SECONDS)
        wrong = Secret("a secret of somebody else")
        with pytest.raises(Refused, match=r"\Awrong secret\Z"):
            StreamClient(lease, wrong, plain_bytes(4), None, must_share=False, timeout_seconds=PATIENCE_SECONDS)
        wait_until(lambda: "wrong secret" in caplog.text, "the warning")
        house.held.pop(0)
        assert house.clients[1].push(house.held[1][0], house.gradient(0)).result(PATIENCE_SECONDS).ticket is not None
