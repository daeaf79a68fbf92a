"""The messages of joining, and the errors of calls as they cross."""

from __future__ import annotations

from typing import Any

import pytest

from ormo_rpc.control.messages import JoinRequest, JoinResponse, pack_error, pack_result, unpack_result
from ormo_rpc.errors import Refused, RunEnded, ServerLost, StaleSession, WireError
from ormo_rpc.rendezvous.protocol import from_server

JOIN: dict[str, Any] = {"preferred_worker": 0, "pid": 1, "host": "here", "slot_id": ""}


@pytest.mark.parametrize(
    "changes",
    [
        {"preferred_worker": -1},
        {"preferred_worker": 1 << 15},
        {"preferred_worker": True},
        {"preferred_worker": 1.0},
        {"preferred_worker": "1"},
        {"pid": "1"},
        {"pid": None},
        {"host": 5},
        {"slot_id": None},
    ],
    ids=str,
)
def test_a_join_request_with_a_wrong_field_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\Ajoin request: got other fields than expected: .*\Z"):
        JoinRequest.parse({**JOIN, **changes})


def test_an_empty_join_request_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\Ajoin request: got other fields than expected: .*\Z"):
        JoinRequest.parse({})


def test_names_in_a_join_request_are_cut_and_printable() -> None:
    request = JoinRequest.parse(
        {**JOIN, "preferred_worker": None, "host": "\x1b[31m" + "x" * 100, "slot_id": "s" * 100, "new": 1}
    )
    assert request == JoinRequest(preferred_worker=None, pid=1, host="?[31m" + "x" * 59, slot_id="s" * 64)


def test_a_join_response_names_its_missing_fields() -> None:
    with pytest.raises(WireError, match=r"\Ajoin: got no offers, fingerprint; install the same ormo_rpc on both\Z"):
        from_server(JoinResponse, {"worker": 1, "session_id": "s", "config": ""}, "join")


def test_a_result_crosses() -> None:
    assert unpack_result(pack_result({"a": [1, None, "ü"]})) == {"a": [1, None, "ü"]}


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RunEnded("over"), RunEnded),
        (StaleSession("rejoin"), StaleSession),
        (ValueError("no room"), Refused),
        (OSError("disk"), ServerLost),
        (KeyError(), ServerLost),
    ],
)
def test_the_error_of_a_call_is_raised_at_the_worker(error: Exception, raised: type[Exception]) -> None:
    with pytest.raises(raised) as caught:
        unpack_result(pack_error(error))
    assert (type(caught.value), str(caught.value)) == (raised, str(error) or type(error).__name__)
