"""Records: what the server tells about itself, one event at a time. They are never part of the update path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Kind(Enum):
    """What an event tells."""

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
        kind: What happened.
        seconds: When, since the server's clock began.
        data: The particulars, of plain JSON types.
    """

    kind: Kind
    seconds: float
    data: Mapping[str, Any]

    def line(self) -> dict[str, Any]:
        """The event as one JSON object of ``trace.jsonl``."""
        return {"event": self.kind.value, "seconds": round(self.seconds, 6), **self.data}
