"""Communication schedulers, each in the file of its name: when a worker gets its next ticket."""

from __future__ import annotations

from ormo_rpc.schedulers.base import Scheduler
from ormo_rpc.schedulers.compatibility import incompatibility

__all__ = ["Scheduler", "incompatibility"]
