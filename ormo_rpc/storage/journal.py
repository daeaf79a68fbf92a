"""The journal: every input of the server, made durable before it is acknowledged, so that a crash rolls nothing back.

The parameter server is a deterministic machine: its state is a function of the state at a checkpoint and of the calls since.
The journal holds these calls in order. A new *segment* begins with each copy of the state that is taken for a checkpoint, which
keeps the segment's number; going on from a checkpoint means to make the calls of that segment and of all later ones again.

A record is its length, its CRC-32, a line of JSON, and the bytes of the tensors. What a crash has torn at the end of a segment
was acknowledged to nobody, and counts as never written.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import threading
import zlib
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ormo_rpc.messages import Push
from ormo_rpc.server.parameter_server import ParameterServer

FOLDER = "journal"
_log = logging.getLogger(__name__)
_HEADER = struct.Struct("<QI")
"""Length of what follows, and its CRC-32."""


class NoJournal:
    """Stands where there is no journal, and does nothing."""

    segment = 0
    """The number of the present segment."""

    def start(self, workers: Iterable[int], incarnation: int) -> None:
        """A life of the server has begun with these workers, as this incarnation."""

    def join(self, worker: int) -> None:
        """A worker has come."""

    def leave(self, worker: int) -> None:
        """A worker has gone."""

    def push(self, push: Push, *, rejected: bool) -> None:
        """A push was redeemed or, where it was not finite, rejected."""

    def finish(self) -> None:
        """No further ticket is handed out."""

    def sync(self) -> None:
        """Return when everything so far is on disk. It may be called from any thread, without the server's lock."""

    def rotate(self) -> None:
        """Begin the next segment, since the state was just copied."""

    def forget(self, before: int) -> None:
        """Remove the segments below a number, from which nobody will go on any more."""

    def close(self) -> None:
        """Close the files."""


class Journal(NoJournal):
    """The journal of a run directory.

    All methods but `sync` and `forget` are called under the server's lock. `_syncing` guards the list of files that are still
    to be forced to disk, and lets one force serve all who wait meanwhile.

    Args:
        run_dir: The run directory.

    Raises:
        OSError: from any method, where the disk is full or broken; what was acknowledged before is safe. A call that could not
            be appended may have left a torn record, behind which nothing would be read, so `sync` fails from then on.
    """

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / FOLDER
        self.folder.mkdir(exist_ok=True)
        self.segment = max(_numbers(self.folder), default=-1) + 1
        self._syncing = threading.Lock()
        self._appended = 0
        self._synced = 0
        self._failure: OSError | None = None
        self._file = self._open()
        self._former: list[int] = []

    def start(self, workers: Iterable[int], incarnation: int) -> None:
        """See `NoJournal`, as for the following ones."""
        self._append({"do": "start", "workers": list(workers), "incarnation": incarnation})

    def join(self, worker: int) -> None:
        """Likewise."""
        self._append({"do": "join", "worker": worker})

    def leave(self, worker: int) -> None:
        """Likewise."""
        self._append({"do": "leave", "worker": worker})

    def finish(self) -> None:
        """Likewise."""
        self._append({"do": "finish"})

    def push(self, push: Push, *, rejected: bool) -> None:
        """Likewise. What was rejected is not kept itself, since nothing of it has entered the state."""
        place = {"worker": push.worker, "ticket": push.ticket, "stamp": push.stamp, "incarnation": push.incarnation}
        if rejected:
            self._append({"do": "reject", **place})
            return
        tensors = [push.grad, *push.buffers.values()]
        layout = [(str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for tensor in tensors]
        facts = {"loss": push.loss, "samples": push.samples, "buffers": list(push.buffers), "layout": layout}
        self._append({"do": "push", **place, **facts}, tensors)

    def sync(self) -> None:
        """Likewise."""
        wanted = self._appended
        with self._syncing:
            if self._failure is not None:
                raise OSError(self._failure.errno, self._failure.strerror) from self._failure
            if self._synced >= wanted:
                return
            reached, former, self._former = self._appended, self._former, []
            for descriptor in former:
                os.fsync(descriptor)
                os.close(descriptor)
            os.fsync(self._file)
            self._synced = reached

    def rotate(self) -> None:
        """Likewise."""
        with self._syncing:
            self._former.append(self._file)
            self.segment += 1
            self._file = self._open()

    def forget(self, before: int) -> None:
        """Likewise."""
        for number in _numbers(self.folder):
            if number < before:
                _segment(self.folder, number).unlink(missing_ok=True)

    def close(self) -> None:
        """Likewise."""
        self.sync()
        os.close(self._file)

    def _open(self) -> int:
        return os.open(_segment(self.folder, self.segment), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def _append(self, call: Mapping[str, Any], tensors: Iterable[Tensor] = ()) -> None:
        line = json.dumps(call).encode() + b"\n"
        parts = [memoryview(line), *(_bytes(tensor) for tensor in tensors)]
        checksum = 0
        for part in parts:
            checksum = zlib.crc32(part, checksum)
        parts.insert(0, memoryview(_HEADER.pack(sum(len(part) for part in parts), checksum)))
        try:
            for part in parts:
                while part:
                    part = part[os.write(self._file, part) :]
        except OSError as error:
            self._failure = error
            raise
        self._appended += 1


def replay(run_dir: Path, first: int, server: ParameterServer) -> int:
    """Make the calls of segment ``first`` and all later ones, up to a gap, again; return how many they were."""
    folder, count = run_dir / FOLDER, 0
    for place, number in _numbered(folder, first):
        if number != place:
            # What follows a gap belongs to a state that is lost; it is set aside, so that no later life stumbles over it.
            _log.warning("%s: is missing; %s is not used", _segment(folder, place), _segment(folder, number).name)
            _segment(folder, number).rename(_segment(folder, number).with_suffix(".lost"))
            continue
        for call, payload in _records(_segment(folder, number)):
            _do(server, call, payload)
            count += 1
    return count


def _do(server: ParameterServer, call: Mapping[str, Any], payload: memoryview) -> None:
    """Make one call; the replies that it makes due were for workers that are gone, or will be issued again."""
    kind = call["do"]
    if kind == "start":
        if call["incarnation"] > 0:  # lives that ended before they began have no record, but count
            server.resume_as(call["incarnation"])
        server.start(call["workers"])
    elif kind == "join":
        server.join(call["worker"])
    elif kind == "leave":
        server.leave(call["worker"])
    elif kind == "finish":
        server.finish()
    else:
        place = {name: call[name] for name in ("worker", "ticket", "stamp", "incarnation")}
        if kind == "reject":
            server.reject(Push(**place, grad=torch.empty(0)))
        else:
            grad, *buffers = _tensors(call["layout"], payload)
            named = dict(zip(call["buffers"], buffers, strict=True))
            server.receive(Push(**place, grad=grad, loss=call["loss"], samples=call["samples"], buffers=named))


def _records(file: Path) -> Generator[tuple[dict[str, Any], memoryview]]:
    """The whole records of a segment, up to the first one that is torn."""
    content = memoryview(file.read_bytes())
    while len(content) >= _HEADER.size:
        length, checksum = _HEADER.unpack_from(content)
        body = content[_HEADER.size : _HEADER.size + length]
        if len(body) < length or zlib.crc32(body) != checksum:
            return
        end = bytes(body[: 1 << 20]).index(b"\n")
        yield json.loads(bytes(body[:end])), body[end + 1 :]
        content = content[_HEADER.size + length :]


def _tensors(layout: Iterable[tuple[str, list[int]]], payload: memoryview) -> list[Tensor]:
    found: list[Tensor] = []
    at = 0
    for name, shape in layout:
        dtype = getattr(torch, name)
        count = torch.Size(shape).numel()
        size = count * dtype.itemsize
        flat = torch.frombuffer(bytearray(payload[at : at + size]), dtype=dtype) if count else torch.empty(0, dtype=dtype)
        found.append(flat.reshape(shape))
        at += size
    return found


def _bytes(tensor: Tensor) -> memoryview:
    array: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()  # numpy has no bfloat16
    return memoryview(array)


def _numbered(folder: Path, first: int) -> list[tuple[int, int]]:
    """The segments from a number on: which one is expected at each place, and which one is there."""
    found = sorted(number for number in _numbers(folder) if number >= first)
    return list(enumerate(found, first))


def _numbers(folder: Path) -> list[int]:
    return [int(file.stem) for file in folder.glob("*.log")]


def _segment(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.log"
