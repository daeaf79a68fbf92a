"""Streams that are refused or end: each worker gets the reason, and the others continue."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from ormo_rpc.errors import PushRefused, Refused, ServerLost, StaleSession, WorkerBanned
from ormo_rpc.rendezvous.secret import Secret
from ormo_rpc.transports.base import Transport
from ormo_rpc.transports.stream import frames
from tests.support.processes import PATIENCE_SECONDS, wait_until
from tests.support.stream_peers import BOTH, SHARED, SMALL, TCP, WORKERS, cluster


@pytest.mark.parametrize("transport", BOTH)
def test_refusals_are_what_they_are_in_process_and_change_nothing(
    transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "LIVENESS_SECONDS", int(PATIENCE_SECONDS))  # the stream is not closed before the push comes
    with cluster(max_not_finite=2) as run:
        run.start(*[transport] * WORKERS)
        run.run(5, random.Random(3))
        client, (reply, _) = run.workers[0], run.held[0]
        good = run.gradient(0)
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
        run.check_same_state()
        run.run(5, random.Random(4))

        nan = torch.full_like(good, math.nan)
        answer = client.push(run.held[0][0], nan).result(PATIENCE_SECONDS)
        assert answer.ticket is not None
        said = r"\Aworker 0: 2 gradients in a row were not finite \(runtime\.max_not_finite\)\Z"
        with pytest.raises(WorkerBanned, match=said):
            client.push(answer, good, loss=math.inf).result(PATIENCE_SECONDS)

        run.service.evict(run.service.memberships.by_worker[1], "of this test")
        with pytest.raises(StaleSession, match=r"\Athis session is not valid: .*; rejoin\Z"):
            run.workers[1].push(run.held[1][0], good).result(PATIENCE_SECONDS)
        with pytest.raises(StaleSession, match=r"\Athis session is not valid: .*; rejoin\Z"):
            run.workers[1].register().result(PATIENCE_SECONDS)
        assert run.workers[2].push(run.held[2][0], good).result(PATIENCE_SECONDS).ticket is not None


def test_a_worker_evicted_at_a_barrier_gets_the_reason() -> None:
    with cluster(scheduler="sync", dimension=SMALL) as run:
        run.start(SHARED, TCP, TCP)
        run.step(0)
        run.step(1)
        for worker in (0, 1):
            run.service.evict(run.service.memberships.by_worker[worker], "of this test")
            with pytest.raises(StaleSession, match=rf"\Aworker {worker} was evicted: of this test; rejoin\Z"):
                run.waiting.pop(worker).result(PATIENCE_SECONDS)


def test_the_stream_of_an_evicted_worker_ends() -> None:
    with cluster(dimension=SMALL) as run:
        run.start(*[TCP] * WORKERS)
        run.service.evict(run.service.memberships.by_worker[0], "of this test")
        with pytest.raises(EOFError):
            run.workers[0].client._stream.receive(memoryview(bytearray(1)))  # pyright: ignore[reportPrivateUsage] # what is below
        with pytest.raises(ServerLost, match=r"\Athe connection to the server is lost: the connection has ended.*\Z"):
            run.workers[0].client.register()


@pytest.mark.parametrize("transport", BOTH)
def test_a_worker_that_waits_notices_that_its_lease_is_lost(transport: Transport) -> None:
    with cluster(scheduler="sync", dimension=SMALL) as run:
        run.start(*[transport] * WORKERS)
        run.step(0)
        run.workers[0].lease.lost.set()
        with pytest.raises(ServerLost, match=r"\Athe connection to the server is lost: the other side is not alive\Z"):
            run.waiting.pop(0).result(10)  # long before the patience of a lease is over


def test_a_listener_that_closes_ends_all_streams() -> None:
    with cluster(scheduler="sync", dimension=SMALL) as run:
        run.start(SHARED, TCP, TCP)
        run.step(0)
        run.listener.__exit__()
        with pytest.raises(ServerLost, match=r"\Athe connection to the server is lost: .*\Z"):
            run.waiting.pop(0).result(PATIENCE_SECONDS)


def test_a_stream_without_a_valid_session_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    with cluster(dimension=SMALL) as run:
        run.start(*[TCP] * WORKERS)
        endpoint = run.workers[0].endpoint
        side, payload = TCP.worker_side(), torch.zeros(4, dtype=torch.uint8)
        run.service.evict(run.service.memberships.by_worker[0], "of this test")
        with (
            pytest.raises(
                ServerLost, match=r"\Ano connection to the server: stream: got a session that is not valid; rejoin\Z"
            ),
            side.connect(endpoint, payload),
        ):
            pass
        wrong = replace(endpoint, secret=Secret("a secret of somebody else"))
        with pytest.raises(Refused, match=r"\Awrong secret\Z"), side.connect(wrong, payload):
            pass
        wait_until(lambda: "wrong secret" in caplog.text, "the warning")
        run.held.pop(0)
        assert run.workers[1].push(run.held[1][0], run.gradient(0)).result(PATIENCE_SECONDS).ticket is not None
