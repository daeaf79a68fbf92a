"""The calls of a worker as text, for each carrier."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from typing_extensions import override

from ormo_rpc.control.base import Control
from ormo_rpc.control.messages import JoinRequest, JoinResponse, unpack_result
from ormo_rpc.rendezvous.protocol import from_server


class Calls(Control):
    """The calls of one lease, packed and unpacked.

    Args:
        admission_id: Of the lease.
    """

    def __init__(self, admission_id: str) -> None:
        self._admission_id = admission_id

    @abstractmethod
    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Make a call, and return its result as text.

        Args:
            name: Of the call.
            arguments: Of JSON's types.

        Raises:
            ServerLost: the server has not answered in time, or cannot be reached.
        """

    @override
    def join(self, request: JoinRequest) -> JoinResponse:
        result = self._result("join", admission_id=self._admission_id, request=asdict(request))
        return from_server(JoinResponse, result, "join response")

    @override
    def ask(self, session_id: str, transport: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
        return self._result("ask", session_id=session_id, transport=transport, request=request)

    @override
    def request_leave(self, session_id: str) -> None:
        self._result("request_leave", session_id=session_id)

    @override
    def leave(self, session_id: str) -> None:
        self._result("leave", session_id=session_id)

    def _result(self, name: str, **arguments: Any) -> Mapping[str, Any]:
        return unpack_result(self.call(name, arguments))
