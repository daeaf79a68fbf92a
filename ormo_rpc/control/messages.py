"""The messages of joining, and the form in which calls and their results cross: JSON text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ormo_rpc.errors import Refused, RunEnded, ServerLost, StaleSession
from ormo_rpc.rendezvous.protocol import MAX_NAME_CHARACTERS, printable

MAX_WORKER = (1 << 15) - 1
"""The largest worker number."""
_CROSSING: Mapping[str, type[Exception]] = {error.__name__: error for error in (RunEnded, StaleSession, Refused, ServerLost)}
"""The errors of a call, by the name under which they cross."""


@dataclass(frozen=True, kw_only=True)
class JoinRequest:
    """Sent by a process that wants to join.

    Attributes:
        preferred_worker: The worker number to have, if it is free; None for any.
        pid: The process id.
        host: The name of its host.
        slot_id: The process slot that its launcher keeps filled; empty for none.
    """

    preferred_worker: int | None
    pid: int
    host: str
    slot_id: str

    @classmethod
    def parse(cls, request: Mapping[str, Any]) -> JoinRequest:
        """Check the fields of a request.

        Raises:
            ValueError: one is missing, or of another type or range.
        """
        worker, pid, host, slot_id = (request.get(name) for name in ("preferred_worker", "pid", "host", "slot_id"))
        number = worker is None or (type(worker) is int and 0 <= worker <= MAX_WORKER)
        if not (number and type(pid) is int and isinstance(host, str) and isinstance(slot_id, str)):
            raise ValueError(
                f"join request: got other fields than expected: preferred_worker (null, or a number up to {MAX_WORKER}), pid, "
                f"host, slot_id"
            )
        return cls(
            preferred_worker=worker, pid=pid, host=printable(host, MAX_NAME_CHARACTERS), slot_id=slot_id[:MAX_NAME_CHARACTERS]
        )


@dataclass(frozen=True, kw_only=True)
class JoinResponse:
    """Sent by the server to a process that has joined.

    Attributes:
        worker: Its worker number.
        session_id: Authenticates its later calls.
        config: The configuration of the run, as YAML.
        offers: The values that workers need to connect (`ServerSide.start`), by the name of each transport that is served.
        fingerprint: Of the server's model and data set (`Fingerprint.to_dict`); a worker whose own differs gives up.
    """

    worker: int
    session_id: str
    config: str
    offers: Mapping[str, Mapping[str, Any]]
    fingerprint: Mapping[str, Any]


def pack_result(result: Mapping[str, Any]) -> str:
    """The result of a call, as it crosses."""
    return json.dumps({"result": result}, allow_nan=False)


def pack_error(error: Exception) -> str:
    """The error of a call: a refusal keeps its reason, and any other error means that the server could not do it."""
    if isinstance(error, (RunEnded, StaleSession)):
        name = type(error).__name__
    else:
        name = "Refused" if isinstance(error, ValueError) else "ServerLost"
    return json.dumps({"error": name, "text": str(error) or type(error).__name__})


def unpack_result(text: str) -> Mapping[str, Any]:
    """The result of a call.

    Raises:
        RunEnded, StaleSession, Refused, ServerLost: the call has failed so in the server.
    """
    answer = json.loads(text)
    if "error" in answer:
        raise _CROSSING[answer["error"]](answer["text"])
    return answer["result"]
