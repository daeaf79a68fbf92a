"""The server's side of the control plane without a network: admissions, memberships, and what crosses for each error."""

from __future__ import annotations

import json
import threading
from collections.abc import Generator, Mapping
from typing import Any

import pytest
import torch

from ormo_rpc.control.dispatch import Dispatcher
from ormo_rpc.control.memberships import Membership, Memberships
from ormo_rpc.control.messages import JoinRequest, JoinResponse, unpack_result
from ormo_rpc.control.server import ControlServer
from ormo_rpc.errors import Refused, RunEnded, ServerLost, StaleSession, WireError
from ormo_rpc.rendezvous.protocol import Admission
from tests.support.processes import PATIENCE_SECONDS, wait_until

REQUEST = {"preferred_worker": 3, "pid": 7, "host": "here", "slot_id": ""}
ADMISSION = Admission(
    admission_id="", control="rpc", agent=None, heartbeat_seconds=1.0, timeout_seconds=9.0, call_timeout_seconds=5.0
)


class Handler:
    """Gives memberships, and notes what happens to them."""

    def __init__(self) -> None:
        self.memberships = Memberships(4)
        self.calls: list[tuple[str, int | str]] = []
        self.error: Exception | None = None
        self.may_join = threading.Event()
        self.may_join.set()

    def join(self, request: JoinRequest) -> Membership:
        """Give a membership once it may."""
        if self.error is not None:
            raise self.error
        membership = self.memberships.add(request.preferred_worker, request.pid, request.host, request.slot_id)
        self.calls.append(("join", membership.worker))
        assert self.may_join.wait(PATIENCE_SECONDS)
        return membership

    def is_member(self, session_id: str) -> bool:
        """Tell whether a session is valid."""
        return session_id in self.memberships.by_session

    def evict(self, membership: Membership, reason: str) -> None:
        """End a membership."""
        self.calls.append(("evict", membership.worker))
        if self.is_member(membership.session_id):
            self.memberships.remove(membership)

    def request_leave(self, membership: Membership) -> None:
        """Note it."""
        self.calls.append(("request_leave", membership.worker))

    def leave(self, session_id: str) -> None:
        """Note it."""
        self.calls.append(("leave", session_id))


class Control:
    """A control plane, and calls to it."""

    def __init__(self) -> None:
        self.handler = Handler()
        self.dispatcher = Dispatcher()
        self.server = ControlServer(self.handler, self.respond, self.answer, ADMISSION, self.dispatcher)
        self.server.agent = lambda: "uv://127.0.0.1:9"

    def respond(self, membership: Membership) -> JoinResponse:
        """Respond with a short configuration."""
        return JoinResponse(
            worker=membership.worker,
            session_id=membership.session_id,
            config="seed: 3\n",
            offers={"auto": {"a": 1}},
            fingerprint={},
        )

    def answer(self, session_id: str, transport: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Answer with what came; a text is refused."""
        if "refuse" in request:
            raise request["refuse"](request["text"])
        return {"session_id": session_id, "transport": transport, "request": request}

    def admit(self) -> str:
        """Admit a process."""
        return self.server.admit("pid 7 on here").admission_id

    def call(self, name: str, **arguments: Any) -> Any:
        """Make a call as a worker does."""
        return unpack_result(self.server.call(name, json.dumps(arguments)))

    def join(self, admission_id: str) -> Any:
        """Join with an admission."""
        return self.call("join", admission_id=admission_id, request=REQUEST)


@pytest.fixture
def control() -> Generator[Control]:
    """A control plane that is closed afterwards."""
    made = Control()
    yield made
    made.dispatcher.close()


def test_a_process_joins_with_its_admission_asks_and_leaves(control: Control) -> None:
    admission = control.server.admit("pid 7 on here")
    assert (admission.control, admission.agent, admission.call_timeout_seconds) == ("rpc", "uv://127.0.0.1:9", 5.0)
    response = control.join(admission.admission_id)
    session = response["session_id"]
    assert (response["worker"], response["config"], response["offers"]) == (3, "seed: 3\n", {"auto": {"a": 1}})
    answer = control.call("ask", session_id=session, transport="gloo", request={"open": [1, None]})
    assert answer == {"session_id": session, "transport": "gloo", "request": {"open": [1, None]}}
    assert control.call("request_leave", session_id=session) == control.call("leave", session_id=session) == {}
    assert control.handler.calls == [("join", 3), ("request_leave", 3), ("leave", session)]


@pytest.mark.parametrize(
    "arguments",
    [torch.ones(2), b"{}", "[" * 100_000, "9" * 5000, "5"],
    ids=["a tensor", "bytes", "nested too deep", "a number too long", "a number"],
)
def test_arguments_of_another_form_are_refused_without_a_traceback(
    control: Control, arguments: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert "error" in json.loads(control.server.call("join", arguments))
    assert caplog.records == []


def test_a_repeated_join_gets_the_same_membership(control: Control) -> None:
    """The answer to the first may have been lost."""
    admission = control.admit()
    assert control.join(admission) == control.join(admission)
    assert control.handler.calls == [("join", 3)]


def test_the_end_of_a_lease_ends_the_membership_of_its_admission_and_no_other(control: Control) -> None:
    first, second, unused = control.admit(), control.admit(), control.admit()
    control.join(first)
    session = control.join(second)["session_id"]
    control.server.ended(first, "its connection was closed")
    control.server.ended(unused, "its connection was closed")
    assert control.handler.calls == [("join", 3), ("join", 4), ("evict", 3)]
    assert control.call("ask", session_id=session, transport="", request={})["session_id"] == session


@pytest.mark.parametrize("admission", ["ended", "never given"])
def test_an_admission_that_is_not_valid_is_refused(control: Control, admission: str) -> None:
    given = control.admit()
    control.server.ended(given, "its connection was closed")
    with pytest.raises(StaleSession, match=r"\Acontrol: this admission is not valid: its lease has ended; connect again\Z"):
        control.join(given if admission == "ended" else "0" * 32)
    assert control.handler.calls == []


def test_a_lease_that_ends_while_its_process_joins_leaves_no_membership(control: Control) -> None:
    admission = control.admit()
    control.handler.may_join.clear()
    errors: list[Exception] = []

    def join() -> None:
        try:
            control.join(admission)
        except StaleSession as error:
            errors.append(error)

    joining = threading.Thread(target=join)
    joining.start()
    wait_until(lambda: control.handler.calls, "the call", every_seconds=0.001)
    control.server.ended(admission, "its connection was closed")  # waits for nothing that joins
    control.handler.may_join.set()
    joining.join(PATIENCE_SECONDS)
    assert [str(error) for error in errors] == ["control: the lease ended while this process joined; connect again"]
    assert control.handler.calls == [("join", 3), ("evict", 3)]
    assert len(control.handler.memberships) == 0


@pytest.mark.parametrize("name", ["ask", "request_leave"])
def test_calls_of_a_session_that_is_not_valid_are_refused(control: Control, name: str) -> None:
    session = control.join(control.admit())["session_id"]
    control.handler.evict(control.handler.memberships.by_worker[3], "too late")
    for given in (session, "another"):
        with pytest.raises(StaleSession, match="this session is not valid"):
            control.call(name, session_id=given, transport="gloo", request={})


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("sing", {}, "control: got a call of 'sing', expected one of join, ask, request_leave, leave, with arguments"),
        ("join", {}, "control: admission_id: got NoneType, expected text"),
        ("join", {"admission_id": ["a"]}, "control: admission_id: got list, expected text"),
        ("leave", {"session_id": 5}, "control: session_id: got int, expected text"),
    ],
)
def test_a_wrong_call_is_refused_with_the_reason(control: Control, name: str, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(Refused) as caught:
        control.call(name, **arguments)
    assert str(caught.value) == text


@pytest.mark.parametrize("arguments", ["[1]", "{", "\x00", "null"])
def test_arguments_that_are_no_object_are_refused(control: Control, arguments: str) -> None:
    with pytest.raises(Refused):
        unpack_result(control.server.call("join", arguments))


def test_a_join_request_of_another_form_is_refused(control: Control) -> None:
    for request in (None, 5, {}, {**REQUEST, "pid": "7"}):
        with pytest.raises(Refused, match="join request: got other fields than expected"):
            control.call("join", admission_id=control.admit(), request=request)


@pytest.mark.parametrize(
    ("error", "raised"),
    [(RunEnded("the run has ended"), RunEnded), (ValueError("no room"), Refused), (OSError("no memory"), ServerLost)],
)
def test_an_error_of_the_service_crosses(control: Control, error: Exception, raised: type[Exception]) -> None:
    control.handler.error = error
    with pytest.raises(raised, match=str(error)) as caught:
        control.join(control.admit())
    assert type(caught.value) is raised


def test_a_call_on_the_connection_of_a_lease_violates_the_protocol_where_there_are_agents(control: Control) -> None:
    with pytest.raises(WireError, match=r"expected it by torch\.distributed\.rpc"):
        control.server.received(control.admit(), {"call": 1, "name": "leave", "arguments": "{}"}, lambda _: None)
