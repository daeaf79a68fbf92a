"""Events of the server, as the trace records them, and statistics over them; no part of the update path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Kind(Enum):
    """The kind of an event."""

    issue = "issue"
    reissue = "reissue"
    apply = "apply"
    discard = "discard"
    repeat = "repeat"
    join = "join"
    leave = "leave"
    pause = "pause"
    proceed = "proceed"
    checkpoint = "checkpoint"
    resume = "resume"
    finish = "finish"
    end = "end"


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the trace.

    Attributes:
        kind: Its kind.
        seconds: Its time on the server's clock, which begins at 0.
        data: Its further fields, of plain JSON types.
    """

    kind: Kind
    seconds: float
    data: Mapping[str, Any]

    def line(self) -> dict[str, Any]:
        """Return the event as one JSON object of ``trace.jsonl``."""
        return {"event": self.kind.value, "seconds": round(self.seconds, 6), **self.data}
