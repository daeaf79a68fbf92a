"""Connections that cannot be opened: how soon that is known, how often they are tried, and the words for it."""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
import time

import pytest

from ormo_rpc.rendezvous import connecting
from ormo_rpc.rendezvous.connecting import NoConnection, Patience, is_unanswered, open_connection
from tests.support.processes import wait_until
from tests.support.rendezvous import silent_port


def test_a_port_that_does_not_answer_is_given_up_soon_however_much_time_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connecting, "CONNECT_SECONDS", 0.2)
    began = time.monotonic()
    with silent_port() as address, pytest.raises(NoConnection, match=r"\Ano answer within 0\.2 s, as behind a firewall\Z"):
        open_connection(address, 180.0)
    assert time.monotonic() - began < 10


def test_a_connection_that_waits_for_its_answer_is_found() -> None:
    with silent_port() as address, socket.socket() as waiting:
        assert not is_unanswered(address)
        waiting.setblocking(False)
        waiting.connect_ex(address)
        assert is_unanswered(address)
        assert not is_unanswered((address[0], address[1] + 1))
    assert not is_unanswered(address)


def test_a_port_where_nothing_listens_and_a_name_of_nobody_are_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()
    with pytest.raises(NoConnection, match=r"\Arefused: nothing listens there\Z"):
        open_connection(free, 1.0)
    with pytest.raises(NoConnection, match=r"\Athe name nobody\.invalid is not resolved \(.+\)\Z"):
        open_connection(("nobody.invalid", 5), 1.0)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENETUNREACH, "no route (Network is unreachable)"),
        (errno.EHOSTUNREACH, "no route (No route to host)"),
        (errno.EINVAL, "no route (Invalid argument)"),
        (errno.EACCES, "not allowed (Permission denied)"),
        (errno.EMFILE, "Too many open files"),
    ],
)
def test_other_reasons_are_in_the_words_of_a_user(number: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(socket, "create_connection", fail)
    with pytest.raises(NoConnection, match=rf"\A{re.escape(said)}\Z"):
        open_connection(("10.0.0.5", 5), 1.0)


def test_failures_are_told_ever_more_seldom_and_no_longer_than_the_context(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connecting, "TELL_AFTER_SECONDS", 0.02)
    with caplog.at_level(logging.WARNING, "ormo_rpc"):
        with Patience("no server at 10.0.0.5:5", 180.0) as patience:
            patience.failed(NoConnection("refused"))
            wait_until(lambda: len(caplog.messages) == 4, "four lines")
            patience.failed(EOFError())
            assert 0.54 <= patience.seconds < 1.5  # the fourth comes after 0.02 * 3 ** 3 s, the fifth three times as late
        assert set(caplog.messages) == {"no server at 10.0.0.5:5: refused; trying for another 180 s"} | {
            line for line in caplog.messages if "another 179 s" in line
        }
        said = len(caplog.messages)
        time.sleep(0.05)
        assert len(caplog.messages) == said
    assert re.fullmatch(r"no server at 10\.0\.0\.5:5: EOFError; gave up after \d\.\d s", patience.given_up())


def test_what_has_not_failed_is_told_later(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A server that is started again, or loads its data, is no reason to worry."""
    monkeypatch.setattr(connecting, "TELL_AFTER_SECONDS", 0.01)
    monkeypatch.setattr(connecting, "TELL_WAITING_SECONDS", 0.05)
    with caplog.at_level(logging.WARNING, "ormo_rpc"), Patience("no server", 180.0) as patience:
        patience.waits_for("connected, and the server does not answer yet")
        wait_until(lambda: caplog.messages, "a line", every_seconds=0.005)
        assert patience.seconds >= 0.05
    assert caplog.messages[0].startswith("no server: connected, and the server does not answer yet; trying for another ")
