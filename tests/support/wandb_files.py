"""The files of an offline wandb run: logs in the format of LevelDB's, of records that protocol buffers describe."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HEADER_BYTES, BLOCK_BYTES = 7, 32768
CHUNK = struct.Struct("<IHB")
FULL, LAST = 1, 4
"""Kinds of chunks that end a record."""


@dataclass
class OfflineRun:
    """The content of one ``run-ID.wandb``.

    Attributes:
        run: The newest record of the run itself: ``run_id``, ``project``, ``sweep_id``, ``run_group``, ...
        config: The configuration.
        rows: The rows that were logged.
        summary: The summary.
    """

    run: Any = None
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    rows: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    summary: dict[str, Any] = field(default_factory=dict[str, Any])


def offline_runs(folder: Path) -> list[OfflineRun]:
    """Read all runs below a folder, oldest first."""
    files = sorted(folder.rglob("run-*.wandb"), key=lambda file: file.stat().st_mtime)
    return [_read(file) for file in files]


def _read(file: Path) -> OfflineRun:
    from wandb.proto import wandb_internal_pb2

    found, protocol = OfflineRun(), wandb_internal_pb2
    for data in _records(file.read_bytes()):
        record: Any = protocol.Record()  # pyright: ignore[reportAttributeAccessIssue] # made when the module is imported
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
            found.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "config":
            found.config |= {item.key: json.loads(item.value_json) for item in record.config.update}
        elif kind == "history":
            items = record.history.item
            found.rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        elif kind == "summary":
            found.summary |= {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.summary.update
            }
    return found


def _records(content: bytes) -> Iterator[bytes]:
    position, parts = HEADER_BYTES, list[bytes]()
    while position + CHUNK.size <= len(content):
        left = BLOCK_BYTES - position % BLOCK_BYTES
        if left < CHUNK.size:  # too little for a chunk: filled with zeros
            position += left
            continue
        _, length, kind = CHUNK.unpack_from(content, position)
        start = position + CHUNK.size
        parts.append(content[start : start + length])
        position = start + length
        if kind in (FULL, LAST):
            yield b"".join(parts)
            parts = []
