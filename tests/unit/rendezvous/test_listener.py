"""The door and the lease over real sockets: who is let in, and how it is noticed that somebody is gone."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

from ormo_rpc.errors import ConfigError, Refused, RunEnded, ServerLost
from ormo_rpc.rendezvous import listener as door_module
from ormo_rpc.rendezvous import protocol as wire
from ormo_rpc.rendezvous.addresses import bound, interface_address, name_of, parse
from ormo_rpc.rendezvous.lease import Lease, connect
from ormo_rpc.rendezvous.listener import Listener
from ormo_rpc.rendezvous.memberships import Membership
from ormo_rpc.rendezvous.secret import Secret
from tests.support.processes import PATIENCE_SECONDS, wait_until

SECRET = Secret("a secret that only we two know")
WELCOME = {"config": "seed: 3\n", "agent": "uv://127.0.0.1:9", "heartbeat_seconds": 0.05, "patience_seconds": 1.0}


class MembershipHandler:
    """Lets everybody in, and notes what it is told."""

    def __init__(self, refuse: str = "") -> None:
        self.refuse = refuse
        self.error: type[ValueError] = ValueError
        self.requests: list[Mapping[str, Any]] = []
        self.told: list[tuple[str, int, str]] = []

    def join(self, hello: Mapping[str, Any]) -> Membership:
        """Membership it, or say why not."""
        if self.refuse:
            raise self.error(self.refuse)
        self.requests.append(hello)
        return Membership(len(self.requests) - 1, hello["process"], hello["host"], hello["slot"])

    def evict(self, membership: Membership, reason: str) -> None:
        """Note it."""
        self.told.append(("evict", membership.worker, reason))

    def request_leave(self, membership: Membership) -> None:
        """Note it."""
        self.told.append(("request_leave", membership.worker, ""))


@contextmanager
def attach(keeper: MembershipHandler, patience_seconds: float = 1.0) -> Generator[tuple[str, int]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with Listener(listener, SECRET, keeper, {**WELCOME, "patience_seconds": patience_seconds}, patience_seconds):
            yield listener.getsockname()[:2]
        listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts


def knock(address: tuple[str, int], secret: Secret = SECRET, timeout_seconds: float = PATIENCE_SECONDS) -> Lease:
    return connect(lambda: address, secret, wanted=5, slot="slot", timeout_seconds=timeout_seconds)


def test_who_knows_the_secret_is_let_in_and_told_what_it_needs() -> None:
    keeper = MembershipHandler()
    with attach(keeper) as address, knock(address) as lease:
        assert (lease.join_response.worker, lease.join_response.config, lease.join_response.agent) == (
            0,
            "seed: 3\n",
            "uv://127.0.0.1:9",
        )
        assert len(lease.join_response.session_id) == 32
        assert (keeper.requests[0]["wanted"], keeper.requests[0]["slot"]) == (5, "slot")
        lease.leave()
        wait_until(lambda: ("request_leave", 0, "") in keeper.told, "the wish to leave")
        assert not lease.lost.is_set()


def test_a_wrong_secret_and_a_full_house_are_told_why(caplog: pytest.LogCaptureFixture) -> None:
    with attach(MembershipHandler("no room")) as address:
        with pytest.raises(Refused, match=r"\Athe server at 127\.0\.0\.1:\d+ refused us: wrong secret\Z"):
            knock(address, Secret("a secret of somebody else"))
        with pytest.raises(Refused, match=r"\Athe server at 127\.0\.0\.1:\d+ refused us: no room\Z"):
            knock(address)
        wait_until(lambda: len(caplog.records) == 2, "both warnings")
    said = sorted(re.sub(r"127\.0\.0\.1:\d+", "HERE", record.getMessage()) for record in caplog.records)
    assert said == ["HERE was not let in: no room", "HERE was not let in: wrong secret"]
    assert "somebody else" not in caplog.text


def test_who_comes_after_the_end_is_told_so_and_need_not_come_again() -> None:
    keeper = MembershipHandler()
    keeper.error = RunEnded
    keeper.refuse = "the run has ended"
    with attach(keeper) as address, pytest.raises(RunEnded, match=r"\Athe run has ended\Z"):
        knock(address)


def test_a_connection_that_ends_is_known_at_once_on_both_sides() -> None:
    keeper = MembershipHandler()
    with attach(keeper, patience_seconds=PATIENCE_SECONDS) as address:
        with knock(address):
            pass
        wait_until(lambda: keeper.told == [("evict", 0, "its connection was closed")], "the news")
        lease = knock(address).__enter__()
    assert lease.lost.wait(PATIENCE_SECONDS / 2)  # the door is closed: long before the patience ends
    lease.__exit__()
    assert len(keeper.told) == 1  # we closed it ourselves, so nobody was lost


@pytest.mark.parametrize("silent", ["worker", "server"])
def test_silence_is_noticed_by_the_other_side(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper, heard = MembershipHandler(), threading.Event()

    def let_in_and_say_no_more(door: Listener, connection: socket.socket, _: wire.LineReader, membership: Membership) -> None:
        wire.send(connection, {**door.join_response, "worker": membership.worker, "session_id": membership.session_id})
        assert heard.wait(PATIENCE_SECONDS)

    if silent == "worker":
        monkeypatch.setattr(Lease, "_beat", lambda _: None)
    else:
        monkeypatch.setattr(Listener, "_keep", let_in_and_say_no_more)
    with attach(keeper, patience_seconds=0.3) as address, knock(address) as lease:
        assert lease.lost.wait(PATIENCE_SECONDS)
        if silent == "worker":
            wait_until(lambda: keeper.told == [("evict", 0, "it was silent for 0.3 s")], "the news")
        else:
            heard.set()


def test_beats_keep_a_lease_for_longer_than_the_patience() -> None:
    keeper = MembershipHandler()
    with attach(keeper, patience_seconds=0.5) as address, knock(address) as lease:
        assert not lease.lost.wait(1.5)
        assert keeper.told == []


def test_nonsense_from_who_was_let_in_costs_it_its_seat() -> None:
    keeper = MembershipHandler()
    with attach(keeper) as address, knock(address) as lease:
        lease.connection.sendall(b"[1, 2]\n")
        wait_until(lambda: keeper.told, "the news")
    assert keeper.told[0] == ("evict", 0, "it sent nonsense: a JSON list came, expected an object")


def test_strangers_who_say_nothing_do_not_keep_workers_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door_module, "HANDSHAKE_SECONDS", 0.2)
    with attach(MembershipHandler()) as address:
        strangers = [socket.create_connection(address) for _ in range(2 * door_module.MAX_UNAUTHENTICATED)]
        with knock(address) as lease:
            assert lease.join_response.worker == 0
        for stranger in strangers:
            stranger.close()


def test_a_server_that_is_not_there_yet_is_waited_for_and_not_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()[:2]
    with pytest.raises(
        ServerLost, match=rf"\Ano server lets us in at 127\.0\.0\.1:{free[1]}: .*refused; given up after 0\.5 s\Z"
    ):
        knock(free, timeout_seconds=0.5)
    assert "trying for" not in caplog.text  # it was a matter of moments


# -- addresses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["", "host", "host:", ":5", "host:x", "host:70000", "host:-1"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"\Aserver\.address: got '.*', expected HOST:PORT\Z"):
        parse(address)


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "8.8.8.8:0"])
def test_an_address_that_is_open_to_the_world_has_to_be_asked_for(address: str) -> None:
    with pytest.raises(ConfigError, match=r"\Aserver\.address: got \S+, which is open to the world; .*server\.public=true.*\Z"):
        bound(address, public=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_socket_listens_where_it_is_told_to_and_is_found_there(host: str) -> None:
    try:
        listener = bound(f"[{host}]:0" if ":" in host else f"{host}:0", public=False)
    except ConfigError as error:
        pytest.skip(f"this machine has no such address: {error}")
    with listener:
        assert listener.getsockname()[0] == host
        assert parse(name_of(listener)) == listener.getsockname()[:2]
        with pytest.raises(
            ConfigError, match=rf"\Aserver\.address: got {re.escape(name_of(listener))}, where one cannot listen: .*in use.*\Z"
        ):
            bound(name_of(listener), public=False)
    with bound("0.0.0.0:0", public=True) as listener:
        assert listener.getsockname()[0] == "0.0.0.0"  # noqa: S104 - as was asked


def test_an_interface_has_an_address_or_is_named_as_wrong() -> None:
    assert interface_address("lo") == "127.0.0.1"
    for name in (None, "nonesuch0"):
        with pytest.raises(ConfigError, match=rf"\Aruntime\.interface: got {name}, expected the interface .*\blo\b.*\Z"):
            interface_address(name)
