"""Options of the wire: how gradients and parameters travel between a worker and the server."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ormo_rpc.options import Section, option


class Transport(Enum):
    """How bytes travel."""

    auto = "auto"
    """torch's choice: shared memory between processes of one machine, TCP between machines."""
    uv = "uv"
    """TCP always, as between machines."""


@dataclass(frozen=True, kw_only=True)
class Wire(Section):
    """How gradients and parameters travel."""

    PATH = "wire"
    transport: Transport = option(
        Transport.auto, "auto (shared memory on one machine, TCP between machines) or uv (TCP always)"
    )
