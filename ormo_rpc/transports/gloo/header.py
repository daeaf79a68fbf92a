"""The room for the numbers of a push or a reply, in front of what they belong to."""

from __future__ import annotations

from ormo_rpc.transports.stream.frames import REQUEST_BYTES

HEADER_BYTES = 64 * -(-REQUEST_BYTES // 64)
"""A payload behind it begins at a multiple of 64."""
