"""Follow the trace of a live run while it grows."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TraceEvent:
    """An event of the trace.

    Attributes:
        data: The event as recorded.
        incarnation: Of the server that recorded it.
        read_at: When it was read, on our monotonic clock: up to a few tenths of a second after it happened.
    """

    data: dict[str, Any]
    incarnation: int
    read_at: float


class TraceFollower:
    """Read a trace as it grows; a restarted server truncates it, but what was truncated stays in `events`.

    Args:
        file: ``trace.jsonl`` of the run, which need not exist yet.

    Attributes:
        events: Every event read, in order.
        incarnation: Of the server that recorded the newest event.
        iteration: Gradients applied so far.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.events: list[TraceEvent] = []
        self.incarnation = 0
        self.iteration = 0
        self._offset = 0
        self._last_line = b""
        self._clock_offsets: dict[int, float] = {}

    def poll(self) -> None:
        """Read what is new."""
        if not self.file.is_file():
            return
        with self.file.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(self._offset - len(self._last_line))
            if size < self._offset or file.read(len(self._last_line)) != self._last_line:
                self._offset, self._last_line = self._offset_after_truncation(self.file.read_bytes()), b""
            file.seek(self._offset)
            new = file.read()
        now = time.monotonic()
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines(keepends=True):
            self._last_line = line
            self._add(json.loads(line), now)

    def happened_at(self, event: TraceEvent) -> float:
        """The time of an event on the monotonic clock.

        The server's seconds come from the same clock of the machine, with another origin in each incarnation; the smallest
        delay with which its events were read is next to nothing, so it gives that origin.
        """
        return event.data["seconds"] + self._clock_offsets[event.incarnation]

    def applied_after(self, moment: float) -> list[TraceEvent]:
        """The gradients applied after a time of the monotonic clock, newest first."""
        found: list[TraceEvent] = []
        for event in reversed(self.events):
            if event.read_at < moment:
                break
            if event.data["event"] == "apply" and self.happened_at(event) > moment:
                found.append(event)
        return found

    def _offset_after_truncation(self, content: bytes) -> int:
        """The offset where the present incarnation's events begin, or the end of the file if it has recorded none yet."""
        end = content.rfind(b"\n") + 1
        start = content.rfind(b'{"event": "resume"', 0, end)
        if start < 0:
            return end
        resume = json.loads(content[start : content.index(b"\n", start)])
        return start if resume["incarnation"] > self.incarnation else end

    def _add(self, event: dict[str, Any], now: float) -> None:
        if "seconds" not in event:
            return  # the header
        if event["event"] == "resume":
            self.incarnation = event["incarnation"]
            self.iteration = event["iteration"]
        if event["event"] == "apply":
            self.iteration = event["iteration"] + 1
        delay = now - event["seconds"]
        self._clock_offsets[self.incarnation] = min(self._clock_offsets.get(self.incarnation, float("inf")), delay)
        self.events.append(TraceEvent(event, self.incarnation, now))
