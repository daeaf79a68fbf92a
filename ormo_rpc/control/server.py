"""The server's side of the control plane: admissions, and the calls of workers, whichever carrier brings them."""

from __future__ import annotations

import json
import logging
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from typing_extensions import override

from ormo_rpc.control.base import ControlHandler
from ormo_rpc.control.dispatch import Dispatcher
from ormo_rpc.control.lines import answer_line
from ormo_rpc.control.memberships import Membership
from ormo_rpc.control.messages import JoinRequest, JoinResponse, pack_error, pack_result
from ormo_rpc.errors import StaleSession, WireError
from ormo_rpc.rendezvous.listener import LeaseHandler
from ormo_rpc.rendezvous.protocol import Admission

_log = logging.getLogger(__name__)


@dataclass
class _Admitted:
    """A process that holds a lease, and its membership once it has joined."""

    holder: str
    membership: Membership | None = None
    joining: threading.Lock = field(default_factory=threading.Lock)
    """Held while it joins, so that a call that is repeated gets the same membership."""


class ControlServer(LeaseHandler):
    """Admits processes, and does what they call for. `_lock` guards `_admitted`; no call to `handler` is made under it.

    Args:
        handler: Decides about memberships.
        respond: Makes the answer to a process that has joined.
        answer: Answers a request of a session to a transport; see `ServerSide.answer`.
        admission: For each process, with an id of its own in place of this one's.
        dispatcher: Does the work of the calls.

    Attributes:
        agent: Returns the address of this process's agent, set before any process is admitted; None without one.
    """

    def __init__(
        self,
        handler: ControlHandler,
        respond: Callable[[Membership], JoinResponse],
        answer: Callable[[str, str, Mapping[str, Any]], Mapping[str, Any]],
        admission: Admission,
        dispatcher: Dispatcher,
    ) -> None:
        self.handler = handler
        self.respond = respond
        self.answer = answer
        self.admission = admission
        self.dispatcher = dispatcher
        self.agent: Callable[[], str | None] = lambda: None
        self._calls: Mapping[str, Callable[[Mapping[str, Any]], Mapping[str, Any]]] = {
            "join": self._join,
            "ask": self._ask,
            "request_leave": self._request_leave,
            "leave": self._leave,
        }
        self._lock = threading.Lock()
        self._admitted: dict[str, _Admitted] = {}

    # --------------------------------------------------------------------------------------------- called by the listener

    @override
    def admit(self, holder: str) -> Admission:
        admission = replace(self.admission, admission_id=secrets.token_hex(16), agent=self.agent())
        with self._lock:
            self._admitted[admission.admission_id] = _Admitted(holder)
        return admission

    @override
    def received(self, admission_id: str, message: Mapping[str, Any], send: Callable[[Mapping[str, Any]], None]) -> None:
        if self.admission.control != "socket":
            raise WireError("a call came on the connection of a lease, expected it by torch.distributed.rpc")
        answer_line(message, send, self.call, self.dispatcher)

    @override
    def ended(self, admission_id: str, reason: str) -> None:
        with self._lock:
            admitted = self._admitted.pop(admission_id)
            membership = admitted.membership
        if membership is None:
            _log.info(
                "%s was admitted, and left without joining, as one that evaluates, or looks for the run, does: %s",
                admitted.holder,
                reason,
            )
        else:
            self.handler.evict(membership, reason)

    # --------------------------------------------------------------------------------------------- called by the carriers

    def call(self, name: str, arguments: str) -> str:
        """Make the call of a worker; what it raises is part of the result, so that it crosses.

        Args:
            name: Of the call.
            arguments: As JSON text.
        """
        try:
            given = _json(arguments)
            if name not in self._calls or not isinstance(given, dict):
                raise ValueError(f"control: got a call of {name!r}, expected one of {', '.join(self._calls)}, with arguments")
            return pack_result(self._calls[name](given))
        except Exception as error:
            if not isinstance(error, (ValueError, RecursionError)):  # those that a stranger can cause as often as they like
                _log.exception("a call of %s could not be done", name)
            return pack_error(error)

    def check_admission(self, admission_id: str) -> None:
        """Refuse a process whose lease is not held.

        Raises:
            StaleSession: it is not.
        """
        self._admission(admission_id)

    # ---------------------------------------------------------------------------------------------------------- the calls

    def _join(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        admission_id = _text(given, "admission_id")
        given_request = given.get("request")
        request = JoinRequest.parse(given_request if isinstance(given_request, Mapping) else {})
        admitted = self._admission(admission_id)
        with admitted.joining:
            membership = admitted.membership
            if membership is None:
                membership = self.handler.join(request)
                _log.info("%s joined over %s", membership, self.admission.control)
                with self._lock:
                    admitted.membership = membership
                    held = admission_id in self._admitted
                if not held:  # the lease ended meanwhile, and nobody evicts this membership
                    self.handler.evict(membership, "its lease ended while it joined")
                    raise StaleSession("control: the lease ended while this process joined; connect again")
        return asdict(self.respond(membership))

    def _ask(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        membership, request = self._membership(given), given.get("request")
        if not isinstance(request, Mapping):
            raise ValueError("control: got no request, expected one of JSON's objects")
        return self.answer(membership.session_id, _text(given, "transport"), request)

    def _request_leave(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        self.handler.request_leave(self._membership(given))
        return {}

    def _leave(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        self.handler.leave(_text(given, "session_id"))
        return {}

    def _admission(self, admission_id: str) -> _Admitted:
        """The process whose lease is held."""
        with self._lock:
            admitted = self._admitted.get(admission_id)
        if admitted is None:
            raise StaleSession("control: this admission is not valid: its lease has ended; connect again")
        return admitted

    def _membership(self, given: Mapping[str, Any]) -> Membership:
        """The membership of a session whose lease is held."""
        session_id = _text(given, "session_id")
        with self._lock:
            held = [each.membership for each in self._admitted.values() if each.membership is not None]
        membership = next((each for each in held if each.session_id == session_id), None)
        if membership is None or not self.handler.is_member(session_id):
            raise StaleSession(
                "control: this session is not valid: its worker was evicted, or the server has restarted; rejoin"
            )
        return membership


def _json(text: object) -> Any:
    """Parse the arguments of a call, which a peer may have made of another type."""
    if not isinstance(text, str):
        raise ValueError(f"control: got {type(text).__name__} for the arguments of a call, expected text")
    return json.loads(text)


def _text(given: Mapping[str, Any], name: str) -> str:
    value = given.get(name)
    if not isinstance(value, str):
        raise ValueError(f"control: {name}: got {type(value).__name__}, expected text")
    return value
