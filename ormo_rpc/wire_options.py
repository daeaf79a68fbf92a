"""Options of the wire: how gradients and parameters travel between a worker and the server."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ormo_rpc.options import Section, option


class Transport(Enum):
    """How bytes travel."""

    auto = "auto"
    """Each worker by itself: `shm` where it and the server can share memory, else `tcp`."""
    shm = "shm"
    """Memory that worker and server share, on one machine; a worker that cannot is not let in."""
    tcp = "tcp"
    """Frames on a TCP connection, from and into buffers that are made once."""
    uv = "uv"
    """torch.distributed.rpc over TCP, with an RRef to the server."""


@dataclass(frozen=True, kw_only=True)
class Wire(Section):
    """How gradients and parameters travel."""

    PATH = "wire"
    transport: Transport = option(
        Transport.auto,
        "auto (shm where a worker can, else tcp), shm (shared memory), tcp, or uv (torch.distributed.rpc)",
    )
