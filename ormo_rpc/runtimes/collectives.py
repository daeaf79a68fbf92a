"""Process groups of torch.distributed over all ranks of a run, for the few things that ranks do in step: never for pushes.

The server's process is rank 0, the process of worker w is rank w + 1. torch's default group is not initialised, so nothing else
in the process finds one, and there is no `TCPStore`, which would listen on every interface: what ranks have to know of one
another they leave in a `SharedValues` in the server's process, which the others reach by the control plane.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Generator, Mapping
from datetime import timedelta
from typing import Any, Protocol, TypeGuard

import torch
import torch.distributed as dist
from typing_extensions import override

COLLECTIVES = "collectives"
"""The name that requests to `SharedValues` give in place of that of a transport."""
MAX_VALUES_PER_RANK = 8
"""Gloo leaves one value for each rank."""
MAX_CHARACTERS = 4096
"""Of a key, and of a value in hexadecimal: an address of Gloo's has some 400."""
POLL_SECONDS = 0.005
"""The first pause between two looks for a value; it doubles each time."""
MAX_POLL_SECONDS = 0.02
"""The longest pause in a group of up to four ranks; it grows with their number, so that all of them together ask as often."""

Call = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Brings a request to `SharedValues.answer`, and its answer back; both are of JSON's types."""


class Work(Protocol):
    """An operation that is under way."""

    def wait(self) -> object:
        """Wait until it is done, or the group's time-out has passed."""
        ...


class Group(Protocol):
    """A process group of torch's, of which these methods are used."""

    def size(self) -> int:
        """Return the number of ranks."""
        ...

    def allgather(self, output_tensors: list[list[torch.Tensor]], input_tensors: list[torch.Tensor]) -> Work:
        """Bring the input of every rank to all ranks."""
        ...


class SharedValues:
    """Values that the ranks of a group leave for one another, in the server's process.

    `_lock` guards `_values` and `_closed`.

    Args:
        size: The number of ranks.
    """

    def __init__(self, size: int) -> None:
        self._limit = size * MAX_VALUES_PER_RANK
        self._lock = threading.Lock()
        self._values: dict[str, str] = {}
        self._closed = False

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Keep a value, as ``{"key":, "value":}`` asks, or answer ``{"known": n}`` with all values but the first n that came.

        Raises:
            ValueError: the request is malformed, there are too many values, or the group is no longer wanted.
        """
        key, value, known = request.get("key"), request.get("value"), request.get("known")
        with self._lock:
            if self._closed:
                raise ValueError("collectives: this group is closed")
            if type(known) is int and known >= 0:
                return {"values": dict(itertools.islice(self._values.items(), known, None))}
            if not _is_short(key) or not _is_short(value) or key in self._values or len(self._values) >= self._limit:
                raise ValueError("collectives: got a malformed request, expected a new key with its value, or a number")
            self._values[key] = value
            return {}

    def close(self) -> None:
        """Refuse all requests from now on, so that no rank waits for a value that does not come."""
        with self._lock:
            self._closed = True
            self._values.clear()


class SharedStore(dist.Store):  # pyright: ignore[reportPrivateImportUsage] # documented, not annotated as public
    """The store of a process group over `SharedValues`; it has those methods that Gloo calls.

    Args:
        call: Brings a request to the server's process.
        size: The number of ranks.
        timeout_seconds: For a value to come.
        given_up: Once it is set, no value is waited for.
    """

    def __init__(self, call: Call, size: int, *, timeout_seconds: float, given_up: threading.Event) -> None:
        super().__init__()
        self._call = call
        self._poll_seconds = MAX_POLL_SECONDS * max(1.0, size / 4)
        self._timeout_seconds = timeout_seconds
        self._given_up = given_up
        self._known: dict[str, str] = {}

    @override
    def set(self, key: str, value: str | bytes) -> None:
        content = value.encode() if isinstance(value, str) else value
        self._call({"key": key, "value": content.hex()})

    @override
    def get(self, key: str) -> bytes:
        self.wait([key])
        return bytes.fromhex(self._known[key])

    @override
    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        deadline, pause = time.monotonic() + self._timeout_seconds, POLL_SECONDS
        while not all(key in self._known for key in keys):
            self._known |= self._call({"known": len(self._known)})["values"]
            if all(key in self._known for key in keys):
                return
            if self._given_up.wait(pause):
                raise TimeoutError("no rank is waited for any longer")
            if time.monotonic() > deadline:
                raise TimeoutError(f"a rank did not come within {self._timeout_seconds:g} s")
            pause = min(2 * pause, self._poll_seconds)


@contextlib.contextmanager
def process_group(
    store: SharedStore, rank: int, size: int, *, host: str, timeout_seconds: float, device: str = "cpu"
) -> Generator[Group]:
    """Make a process group, which is destroyed at the end of the context: no thread, descriptor or port stays.

    Every operation ends within the time-out. Wait for each of them to its end: at the end of the context the interpreter would
    stand still for one that is under way.

    Args:
        store: Of all ranks.
        rank: Of this process.
        size: The number of ranks.
        host: The address of this machine at which the other ranks reach it.
        timeout_seconds: For connecting to all ranks once their addresses are known, and for each operation.
        device: The kind of the tensors: Gloo connects CPUs, and NCCL connects GPUs ("cuda"), of which each rank has its own.

    Raises:
        RuntimeError: not all ranks are connected in time.
    """
    timeout = timedelta(seconds=timeout_seconds)
    if device == "cuda":
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = timeout  # pyright: ignore[reportPrivateUsage] # torch's own functions set it so
        group: Any = dist.ProcessGroupNCCL(store, rank, size, nccl)
    else:
        gloo = dist.ProcessGroupGloo._Options()  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue] # torch's own functions make it so
        gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        gloo._threads = 1
        gloo._timeout = timeout
        group = dist.ProcessGroupGloo(store, rank, size, gloo)
        del gloo  # it holds the device, and so its thread and its port
    try:
        yield group
    finally:
        if device == "cuda":
            group.abort()  # NCCL's shutdown would wait for what is under way
        del group


def gather(group: Group, value: bytes, device: str = "cpu") -> list[bytes]:
    """Bring a value of the same length in every rank to all ranks; return all values by rank.

    Raises:
        RuntimeError: a rank has died, or did not take part in time.
    """
    mine = torch.frombuffer(bytearray(value), dtype=torch.uint8).to(device)
    values = [torch.empty_like(mine) for _ in range(group.size())]
    group.allgather([values], [mine]).wait()
    return [bytes(each.cpu().numpy()) for each in values]


def _is_short(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and 0 < len(value) <= MAX_CHARACTERS
