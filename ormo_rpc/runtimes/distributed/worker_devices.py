"""The devices of a live run's workers, which they tell the server for its log and summary."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ormo_rpc import devices
from ormo_rpc.control.joining import Joined
from ormo_rpc.control.messages import MAX_WORKER
from ormo_rpc.errors import Refused, ServerLost, StaleSession
from ormo_rpc.rendezvous.protocol import MAX_NAME_CHARACTERS, printable
from ormo_rpc.storage.summary import device_entries

CPU = "cpu"
DEVICES = "devices"
"""The name that a worker's request gives in place of that of a transport."""
_log = logging.getLogger(__name__)


class WorkerDevices:
    """The server's side: what workers have told."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._devices: dict[int, str] = {}
        self._peaks: dict[int, int] = {}

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Take note of a worker's device, and of the most GPU memory that it has had so far.

        Raises:
            ValueError: the request is malformed.
        """
        worker, device, peak = request.get("worker"), request.get("device"), request.get("peak_bytes")
        if not (type(worker) is int and 0 <= worker <= MAX_WORKER and isinstance(device, str) and type(peak) is int):
            raise ValueError("devices: got a malformed request, expected worker, device and peak_bytes")
        text = printable(device, MAX_NAME_CHARACTERS)
        with self._lock:
            known, self._devices[worker] = self._devices.get(worker), text
            self._peaks[worker] = max(peak, self._peaks.get(worker, 0))
        if known != text:
            _log.info("worker %d computes on %s", worker, text)
        return {}

    def summary_entries(self, workers: Iterable[int]) -> dict[str, Any]:
        """Return the entries of a summary; workers that have told nothing compute on a CPU."""
        with self._lock:
            return device_entries({**dict.fromkeys(workers, CPU), **self._devices}, self._peaks.values())


class DeviceReports:
    """A worker's side: tells the server of its GPU, before the first ticket, and of its memory some tickets later.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._text = devices.described(device)
        self._peak = -1
        self._tickets = 0

    def begin(self, membership: Joined) -> None:
        """Tell the device to a server that this worker has joined."""
        _log.info("worker %d computes on %s", membership.response.worker, self._text)
        if self._device.type == "cuda":
            self._tell(membership)

    def ticket(self, membership: Joined) -> None:
        """Note that a ticket is done; after the 1st, 2nd, 4th, 8th, ... a peak that has grown is told."""
        self._tickets += 1
        due = self._tickets & (self._tickets - 1) == 0
        if due and self._device.type == "cuda" and devices.peak_bytes(self._device) > self._peak:
            self._tell(membership)

    def _tell(self, membership: Joined) -> None:
        self._peak = devices.peak_bytes(self._device)
        told = {"worker": membership.response.worker, "device": self._text, "peak_bytes": self._peak}
        with contextlib.suppress(ServerLost, StaleSession, Refused):  # noticed where it matters
            membership.control.ask(membership.response.session_id, DEVICES, told)
