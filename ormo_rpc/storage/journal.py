"""The journal, a write-ahead log: every input of the server is durable before it is acknowledged, so a crash loses none.

The parameter server is deterministic: its state is a function of the state at a checkpoint and of the calls since. The journal
holds these calls in order. A new *segment* begins with each copy of the state that is taken for a checkpoint, which keeps the
segment's number; recovering from a checkpoint means making the calls of that segment and of all later ones again, each at the
time that it had.

A record is its length, its CRC-32, a line of JSON, and the bytes of the tensors. A record torn by a crash at the end of a
segment was never acknowledged, and counts as not written.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import struct
import threading
import zlib
from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from typing_extensions import override

from ormo_rpc.messages import Push, number_fields
from ormo_rpc.server.buffer_layout import as_bytes
from ormo_rpc.server.parameter_server import ParameterServer

FOLDER = "journal"
_log = logging.getLogger(__name__)
_PUSH_NUMBERS = tuple(field.name for field in number_fields(Push))
_REJECTED = ("worker", "ticket", "stamp", "incarnation", "loss_scale")
"""The numbers of a push that is rejected which are kept."""
_HEADER = struct.Struct("<QI")
"""Length of the rest of a record, and its CRC-32."""


class Journal(Protocol):
    """Record of the calls that change a server.

    Attributes:
        durable: Pushes are recorded before they are acknowledged.
        segment: The number of the present segment.
    """

    durable: bool
    segment: int

    def start(self, workers: Iterable[int], incarnation: int) -> None:
        """Record that this incarnation of the server started with these workers."""
        ...

    def join(self, worker: int) -> None:
        """Record that a worker joined."""
        ...

    def leave(self, worker: int) -> None:
        """Record that a worker left or was evicted."""
        ...

    def push(self, push: Push, *, rejected: bool, overflow: bool = False) -> None:
        """Record a push that was committed or, being not finite, rejected; at an ``overflow``, the loss scale was lowered."""
        ...

    def finish(self) -> None:
        """Record that no further ticket is issued."""
        ...

    def sync(self) -> None:
        """Return when every record so far is on disk; callable from any thread, without the server's lock."""
        ...

    def rotate(self) -> None:
        """Begin the next segment, because the state was just copied."""
        ...

    def forget(self, before: int) -> None:
        """Remove the segments below a number, which no checkpoint needs any more."""
        ...

    def close(self) -> None:
        """Close the files."""
        ...


class NoJournal(Journal):
    """A journal that records nothing, for ``checkpoint.journal=false``."""

    durable = False
    segment = 0

    @override
    def start(self, workers: Iterable[int], incarnation: int) -> None: ...

    @override
    def join(self, worker: int) -> None: ...

    @override
    def leave(self, worker: int) -> None: ...

    @override
    def push(self, push: Push, *, rejected: bool, overflow: bool = False) -> None: ...

    @override
    def finish(self) -> None: ...

    @override
    def sync(self) -> None: ...

    @override
    def rotate(self) -> None: ...

    @override
    def forget(self, before: int) -> None: ...

    @override
    def close(self) -> None: ...


class FileJournal(Journal):
    """The journal in a run directory's files.

    All methods but `sync` and `forget` are called under the server's lock. `_syncing` guards the list of files that still have
    to be forced to disk, and lets one fsync serve every thread that waits meanwhile.

    Args:
        run_dir: The run directory.
        clock: The run's seconds; without one, calls have no time.

    Raises:
        OSError: from any method, where the disk is full or broken; what was acknowledged before is safe. After a failed append,
            fsync or rotation every later one fails: a torn record hides those after it, the system may have dropped what the
            next fsync reports as written, and records would lie in the wrong segment.
    """

    durable = True

    def __init__(self, run_dir: Path, clock: Callable[[], float] | None = None) -> None:
        self.folder = run_dir / FOLDER
        self._clock = clock
        self.folder.mkdir(exist_ok=True)
        self.segment = max(_segment_numbers(self.folder), default=-1) + 1
        self._syncing = threading.Lock()
        self._appended = 0
        self._synced = 0
        self._failure: OSError | None = None
        self._file = self._open()
        self._unsynced_files: list[int] = []

    @override
    def start(self, workers: Iterable[int], incarnation: int) -> None:
        self._append({"do": "start", "workers": list(workers), "incarnation": incarnation})

    @override
    def join(self, worker: int) -> None:
        self._append({"do": "join", "worker": worker})

    @override
    def leave(self, worker: int) -> None:
        self._append({"do": "leave", "worker": worker})

    @override
    def finish(self) -> None:
        self._append({"do": "finish"})

    @override
    def push(self, push: Push, *, rejected: bool, overflow: bool = False) -> None:
        numbers = {name: getattr(push, name) for name in _PUSH_NUMBERS}
        if rejected:  # the gradient is not kept, since none of it has entered the state
            kept = {name: numbers[name] for name in _REJECTED}
            self._append({"do": "reject", **kept, **({"overflow": True} if overflow else {})})
            return
        tensors = [push.grad, *push.buffers.values()]
        layout = [(str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for tensor in tensors]
        call = {"do": "push", **numbers, "buffers": list(push.buffers), "layout": layout}
        self._append({**call, "metrics": push.metrics} if push.metrics else call, tensors)

    @override
    def sync(self) -> None:
        target = self._appended
        with self._syncing:
            self._refuse_after_failure()
            if self._synced >= target:
                return
            reached, unsynced, self._unsynced_files = self._appended, self._unsynced_files, []
            with self._keeping_failure():
                for descriptor in unsynced:
                    os.fsync(descriptor)
                    os.close(descriptor)
                os.fsync(self._file)
            self._synced = reached

    @override
    def rotate(self) -> None:
        self._refuse_after_failure()
        with self._syncing, self._keeping_failure():
            self.segment += 1
            former, self._file = self._file, self._open()
            self._unsynced_files.append(former)

    @override
    def forget(self, before: int) -> None:
        for number in _segment_numbers(self.folder):
            if number < before:
                _segment_file(self.folder, number).unlink(missing_ok=True)

    @override
    def close(self) -> None:
        self.sync()
        os.close(self._file)

    def _open(self) -> int:
        return os.open(_segment_file(self.folder, self.segment), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    @contextlib.contextmanager
    def _keeping_failure(self) -> Generator[None]:
        """Remember an OSError of the body, so that every later call raises it."""
        try:
            yield
        except OSError as error:
            self._failure = error
            raise

    def _refuse_after_failure(self) -> None:
        if self._failure is not None:
            raise OSError(self._failure.errno, self._failure.strerror) from self._failure

    def _append(self, call: Mapping[str, Any], tensors: Iterable[torch.Tensor] = ()) -> None:
        self._refuse_after_failure()
        timed = call if self._clock is None else {**call, "seconds": self._clock()}
        line = json.dumps(timed).encode() + b"\n"
        parts = [memoryview(line), *(_memory(tensor) for tensor in tensors)]
        checksum = 0
        for part in parts:
            checksum = zlib.crc32(part, checksum)
        parts.insert(0, memoryview(_HEADER.pack(sum(len(part) for part in parts), checksum)))
        with self._keeping_failure():
            for part in parts:
                while part:
                    part = part[os.write(self._file, part) :]
        self._appended += 1


def recover(
    run_dir: Path,
    first: int,
    server: ParameterServer,
    set_clock: Callable[[float], None] = lambda _: None,
    after_each: Callable[[], None] = lambda: None,
) -> int:
    """Make the calls of a segment and all later ones again, up to a missing segment; return their number.

    Args:
        run_dir: The run directory.
        first: The number of the segment.
        server: The server, as the checkpoint has it that the segment follows.
        set_clock: Called before each call that has a time, which one of an earlier version has not.
        after_each: Called after each call.
    """
    folder, count = run_dir / FOLDER, 0
    present = sorted(number for number in _segment_numbers(folder) if number >= first)
    for expected, number in enumerate(present, first):
        file = _segment_file(folder, number)
        if number != expected:
            # Segments after a gap belong to a state that is lost; they are set aside, so that no later incarnation reads them.
            _log.warning("%s: is missing; %s is not used", _segment_file(folder, expected), file.name)
            file.rename(file.with_suffix(".lost"))
            continue
        for call, payload in _records(file):
            if "seconds" in call:
                set_clock(call["seconds"])
            _apply(server, call, payload)
            after_each()
            count += 1
    return count


def _apply(server: ParameterServer, call: Mapping[str, Any], payload: memoryview) -> None:
    """Make one call; its replies are dropped, since their workers have ended or will be issued their tickets again."""
    kind = call["do"]
    if kind == "start":
        if call["incarnation"] > 0:  # incarnations that ended before they started have no record, but count
            server.resume_as(call["incarnation"])
        server.start(call["workers"])
    elif kind == "join":
        server.join(call["worker"])
    elif kind == "leave":
        server.leave(call["worker"])
    elif kind == "finish":
        server.finish()
    else:
        numbers = {name: call[name] for name in _PUSH_NUMBERS if name in call}
        if kind == "reject":
            server.reject(Push(**numbers, grad=torch.empty(0)), overflow=call.get("overflow", False))
        else:
            grad, *buffers = _tensors(call["layout"], payload)
            named = dict(zip(call["buffers"], buffers, strict=True))
            server.receive(Push(**numbers, grad=grad, buffers=named, metrics=_metrics(call.get("metrics", {}))))


def _metrics(content: Mapping[str, Any]) -> dict[str, float | tuple[float, float]]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}


def _records(file: Path) -> Generator[tuple[dict[str, Any], memoryview]]:
    """Yield the complete records of a segment, up to the first one that is torn."""
    content = memoryview(file.read_bytes())
    while len(content) >= _HEADER.size:
        length, checksum = _HEADER.unpack_from(content)
        body = content[_HEADER.size : _HEADER.size + length]
        if not length or len(body) < length or zlib.crc32(body) != checksum:  # of zeros the checksum is right
            return
        end = bytes(body[: 1 << 20]).index(b"\n")
        yield json.loads(bytes(body[:end])), body[end + 1 :]
        content = content[_HEADER.size + length :]


def _tensors(layout: Iterable[tuple[str, list[int]]], payload: memoryview) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    at = 0
    for name, shape in layout:
        dtype = getattr(torch, name)
        count = torch.Size(shape).numel()
        size = count * dtype.itemsize
        flat = torch.frombuffer(bytearray(payload[at : at + size]), dtype=dtype) if count else torch.empty(0, dtype=dtype)
        found.append(flat.reshape(shape))
        at += size
    return found


def _memory(tensor: torch.Tensor) -> memoryview:
    array: Any = as_bytes(tensor).cpu().numpy()
    return memoryview(array)


def _segment_numbers(folder: Path) -> list[int]:
    return [int(file.stem) for file in folder.glob("*.log")]


def _segment_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.log"
