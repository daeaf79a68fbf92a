"""The metrics of a push among its bytes, where the wire form has room for them."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import torch

from ormo_rpc.errors import PushRefused
from ormo_rpc.server.push_metrics import as_push_metrics, check_push_metrics

ROOM = 1024
"""Bytes for the metrics of a push."""
_END = struct.Struct("<H")
"""The end of the last entry."""
_ENTRY = struct.Struct("<B?dd")
"""Bytes of the name, which follows; whether it is a pair; its number or sum, and its count."""


class WireMetrics:
    """Metrics among the bytes of a push.

    Args:
        region: The bytes, uint8, shape (`ROOM`,), or shape (0,) where there is no room; on any device.
    """

    def __init__(self, region: torch.Tensor) -> None:
        self._region = region
        self._on_host = region.cpu()
        """The same memory, or on a GPU a copy of it."""
        self._memory = memoryview(self._on_host.numpy())  # pyright: ignore[reportArgumentType] # an array is a buffer

    def write(self, metrics: Mapping[str, Any]) -> dict[str, float | tuple[float, float]]:
        """Put the metrics of the next push at their place, and return them as `read` does.

        Args:
            metrics: By name anything that `float` takes, or a pair of that (sum, count).

        Raises:
            ValueError: a name or value is not valid, or there is no room for all of them.
        """
        found = as_push_metrics(metrics)
        packed = b"".join(_entry(name, value) for name, value in found.items())
        if _END.size + len(packed) > len(self._memory) and found:
            raise ValueError(
                f"push: metrics: got {len(found)} of them in {len(packed)} bytes, expected at most "
                f"{max(0, len(self._memory) - _END.size)} bytes ({_ENTRY.size} each, and its name)"
            )
        if len(self._memory):
            end = _END.size + len(packed)
            self._memory[:end] = _END.pack(end) + packed
            if self._on_host is not self._region:
                self._region.copy_(self._on_host)
        return found

    def read(self) -> dict[str, float | tuple[float, float]]:
        """The metrics of a push, whose bytes may be forged.

        Raises:
            PushRefused: they are no valid metrics.
        """
        found: dict[str, float | tuple[float, float]] = {}
        if self._on_host is not self._region:
            self._on_host.copy_(self._region)
        data = bytes(self._memory)  # once, as its sender may still change it
        end = _END.unpack_from(data)[0] if data else 0
        at = _END.size
        try:
            if end > len(data):
                raise ValueError("the end is beyond")
            while at < end:
                size, pair, total, count = _ENTRY.unpack_from(data[:end], at)
                at += _ENTRY.size + size
                if at > end:
                    raise ValueError("a name is beyond")
                found[data[at - size : at].decode()] = (total, count) if pair else total
        except (ValueError, struct.error) as error:
            raise PushRefused(
                f"push: metrics: got bytes that are none ({error}); worker and server must have the same version"
            ) from None
        check_push_metrics(found, "push: metrics")
        return found


def _entry(name: str, value: float | tuple[float, float]) -> bytes:
    encoded = name.encode()
    pair = isinstance(value, tuple)
    return _ENTRY.pack(len(encoded), pair, *(value if isinstance(value, tuple) else (value, 0.0))) + encoded
