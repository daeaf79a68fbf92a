"""A group of two processes, made over a connection that they have already, without a server of stores."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage] # documented, not annotated as public
from typing_extensions import override

from ormo_rpc.errors import one_line
from ormo_rpc.rendezvous.protocol import LineReader, send

SERVER, WORKER = 0, 1
"""The ranks of the two."""
OPEN_SECONDS = 30.0
"""A group that is not made by then is given up."""
MAX_LINE_BYTES = 16 * 1024
_ENDS = "stored"
"""Of the line behind the last value."""


class ConnectionStore(Store):
    """Stands in the place of a store: what one side sets crosses the connection, and the other one gets it.

    Args:
        reader: The connection, which carries nothing else until `finish` has returned on both sides.
        timeout_seconds: For all of it.
    """

    def __init__(self, reader: LineReader, timeout_seconds: float) -> None:
        super().__init__()
        self._reader = reader
        self._deadline = time.monotonic() + timeout_seconds
        self._values: dict[str, bytes] = {}
        self._open = True
        self._other_open = True

    @override
    def set(self, key: str, value: Any) -> None:
        self._values[key] = bytes(value)
        if self._open:  # later nobody asks: NCCL's own threads may still tell how they are
            send(self._reader.sock, {"key": key, "value": bytes(value).hex()})

    @override
    def get(self, key: str) -> bytes:
        while key not in self._values and self._other_open:
            self._receive()
        if key not in self._values:
            raise RuntimeError(f"the other side has not set {key}")
        return self._values[key]

    @override
    def wait(self, keys: Any, timeout: Any = None) -> None:
        for key in keys:
            self.get(key)

    @override
    def check(self, keys: Any) -> bool:
        return all(key in self._values for key in keys)

    @override
    def clone(self) -> Store:
        return self

    def finish(self) -> None:
        """Tell the other side that no value follows, and wait until it says so.

        Raises:
            OSError, EOFError: the other side has given up.
        """
        self._open = False
        send(self._reader.sock, {_ENDS: True})
        while self._other_open:
            self._receive()

    def _receive(self) -> None:
        line = self._reader.receive(max(0.0, self._deadline - time.monotonic()), MAX_LINE_BYTES)
        if "error" in line:
            raise EOFError(str(line["error"]))
        if _ENDS in line:
            self._other_open = False
        else:
            self._values[str(line["key"])] = bytes.fromhex(line["value"])


MakeGroup = Callable[[Store, int, torch.device, timedelta], Any]
"""Given a store, the rank, this side's device and the time-out, makes one side of a group of two."""


def nccl_group(store: Store, rank: int, device: torch.device, timeout: timedelta) -> Any:
    """Make one side of a group of NCCL's, with one communicator, on which calls run in order."""
    for name in ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ENABLE_MONITORING"):
        os.environ.setdefault(name, "0")  # else a time-out ends this process
    nccl: Any = dist.ProcessGroupNCCL  # torch's stubs leave out most of it
    options = nccl.Options()
    options.config.blocking = 0  # so that `abort` frees whoever waits, from the first call on
    options._timeout = timeout
    group = nccl(store, rank, 2, options)
    group.eager_connect_single_device(device)
    return group


def connected_group(make: MakeGroup, reader: LineReader, rank: int, device: torch.device) -> Any:
    """Make one side of a group, while the other process makes the other side.

    Raises:
        ValueError: it cannot be made.
        OSError, EOFError: the other side has given up.
    """
    store = ConnectionStore(reader, OPEN_SECONDS)
    try:
        group = make(store, rank, device, timedelta(seconds=OPEN_SECONDS))
    except RuntimeError as error:
        raise ValueError(one_line(error)) from None
    store.finish()
    return group
