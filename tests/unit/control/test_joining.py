"""Joining over the connection of a lease (``runtime.control=socket``), with a real listener in this process."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
from typing_extensions import override

from ormo_rpc.control import joining, torch_rpc
from ormo_rpc.control.dispatch import WAITING_THREADS
from ormo_rpc.control.joining import Joined, joined
from ormo_rpc.control.memberships import Membership
from ormo_rpc.control.messages import JoinRequest
from ormo_rpc.errors import Refused, RunEnded, ServerLost
from ormo_rpc.rendezvous import connecting
from ormo_rpc.rendezvous.lease import connect
from ormo_rpc.rendezvous.secret import Secret
from ormo_rpc.runtimes.distributed.server_process import serving as serving_module
from ormo_rpc.runtimes.distributed.server_process.serving import served
from ormo_rpc.transports.stream.server import StreamServerSide
from tests.support.processes import PATIENCE_SECONDS, wait_until
from tests.support.rendezvous import join_request, serving, silent_port
from tests.support.transport_peers import RecordingService

SECRET = Secret("a secret that only we two know")


class Side(StreamServerSide):
    """Answers requests; one of them when it is let."""

    def __init__(self) -> None:
        super().__init__(share=False)
        self.released = threading.Event()

    @override
    def answer(self, session_id: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
        if "wait" in request:
            assert self.released.wait(PATIENCE_SECONDS)
        return {"got": request}


class Refusing(RecordingService):
    """Refuses all that join, with an error."""

    def __init__(self, error: Exception) -> None:
        super().__init__(3)
        self.error = error

    @override
    def join(self, request: JoinRequest) -> Membership:
        raise self.error


@contextmanager
def listening(service: RecordingService | None = None, side: Side | None = None, **options: Any) -> Generator[Any]:
    """A server; the value is its address."""
    with (
        socket.create_server(("127.0.0.1", 0)) as sock,
        served(sock, SECRET, service or RecordingService(3), side or Side(), serving("tcp", **options)),
    ):
        yield sock.getsockname()[:2]
        sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts


def join(address: tuple[str, int], timeout_seconds: float = PATIENCE_SECONDS) -> AbstractContextManager[Joined]:
    return joined(address, SECRET, join_request(2), timeout_seconds=timeout_seconds)


def test_a_process_is_a_member_for_as_long_as_it_holds_the_lease() -> None:
    service = RecordingService(3)
    with listening(service, config="seed: 3\n") as address:
        with join(address) as membership:
            assert (membership.response.worker, membership.response.config) == (2, "seed: 3\n")
            session = membership.response.session_id
            assert service.is_member(session)
            assert membership.control.ask(session, "tcp", {"a": [1, None]}) == {"got": {"a": [1, None]}}
        wait_until(lambda: not service.is_member(session), "the end of the membership")


def test_calls_of_several_threads_go_on_independently_and_the_lease_with_them() -> None:
    """A call that takes long keeps neither the others nor the heartbeats waiting."""
    side, answers = Side(), dict[int, Any]()
    with listening(side=side, heartbeat_seconds=0.02, timeout_seconds=0.5) as address, join(address) as membership:
        control, session = membership.control, membership.response.session_id

        def ask(number: int) -> None:
            answers[number] = control.ask(session, "tcp", {"wait": number})

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(WAITING_THREADS - 1)]
        for thread in threads:
            thread.start()
        assert control.ask(session, "tcp", {"quick": True}) == {"got": {"quick": True}}
        assert not membership.lease.lost.wait(0.8)
        assert answers == {}
        side.released.set()
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
        assert answers == {number: {"got": {"wait": number}} for number in range(WAITING_THREADS - 1)}


def test_a_call_without_an_answer_in_time_is_a_lost_server() -> None:
    side = Side()
    with listening(side=side, call_timeout_seconds=0.2) as address, join(address) as membership:
        with pytest.raises(ServerLost, match=r"\Aask: no answer within 0\.2 s\Z"):
            membership.control.ask(membership.response.session_id, "tcp", {"wait": True})
        side.released.set()
        assert membership.control.ask(membership.response.session_id, "tcp", {}) == {"got": {}}  # not the late answer


def test_a_call_ends_at_once_when_the_lease_is_lost() -> None:
    side, lost = Side(), threading.Event()
    with listening(side=side) as address, join(address) as membership:

        def ask() -> None:
            with pytest.raises(ServerLost, match="the lease is lost"):
                membership.control.ask(membership.response.session_id, "tcp", {"wait": True})
            lost.set()

        threading.Thread(target=ask).start()
        time.sleep(0.05)  # so that it waits, most likely; either way it has to end
        membership.lease.connection.shutdown(socket.SHUT_RDWR)
        assert lost.wait(PATIENCE_SECONDS / 2)
        side.released.set()
        membership.request_leave()  # which is no error


@pytest.mark.parametrize(
    ("error", "raised", "text"),
    [
        (RunEnded("the run has ended"), RunEnded, r"\Athe run has ended\Z"),
        (ValueError("no room"), Refused, r"\Athe server at 127\.0\.0\.1:\d+ refused this worker: no room\Z"),
    ],
)
def test_a_process_that_may_not_join_is_told_why(error: Exception, raised: type[Exception], text: str) -> None:
    with listening(Refusing(error)) as address, pytest.raises(raised, match=text), join(address):
        pass


def test_a_server_that_cannot_do_it_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "RETRY_SECONDS", 0.01)
    service = Refusing(OSError("no memory"))
    with listening(service) as address:
        threading.Timer(
            0.1, lambda: setattr(service, "join", lambda _: RecordingService.join(service, join_request(2)))
        ).start()
        with join(address) as membership:
            assert membership.response.worker == 2


def test_joining_a_server_that_is_not_there_times_out(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()[:2]
    with (
        pytest.raises(
            ServerLost,
            match=rf"\Ano server can be joined at 127\.0\.0\.1:{free[1]}: refused: .*; gave up after 0\.\d s\Z",
        ),
        join(free, timeout_seconds=0.5),
    ):
        pass
    assert "trying for" not in caplog.text  # which is logged after a longer time


def test_a_server_behind_a_firewall_is_tried_again_and_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first packets were dropped; with time for all of it in one attempt, nobody would hear of it."""
    monkeypatch.setattr(connecting, "CONNECT_SECONDS", 0.1)
    monkeypatch.setattr(connecting, "TELL_AFTER_SECONDS", 0.3)
    attempts: list[float] = []
    monkeypatch.setattr(joining, "connect", lambda *args, **more: attempts.append(0) or connect(*args, **more))
    with silent_port() as (host, port):
        with pytest.raises(ServerLost, match=r"no answer within 0\.1 s, as behind a firewall; gave up after \d\.\d s\Z"):
            join((host, port), timeout_seconds=1.5).__enter__()
        line = (
            rf"no server can be joined at {host}:{port}: no answer within 0\.1 s, as behind a firewall; trying for another 1 s"
        )
        assert re.fullmatch(line, caplog.messages[0])
    assert len(attempts) >= 3


def test_a_server_with_agents_refuses_a_process_without_torchs_rpc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_rpc, "unavailable", lambda: "torch was built without torch.distributed.rpc")
    monkeypatch.setattr(serving_module, "_agent", lambda *_: contextlib.nullcontext())
    with (
        listening(control="rpc") as address,
        pytest.raises(Refused, match="the server uses rpc, expected socket on all machines: torch was built without"),
        join(address),
    ):
        pass
