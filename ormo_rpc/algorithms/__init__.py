"""Server algorithms, each in the file of its name. A new one takes a file here and a row in the table of tests."""

from __future__ import annotations

from ormo_rpc.algorithms.base import Algorithm, LocalWork, PullContext, PushContext

__all__ = ["Algorithm", "LocalWork", "PullContext", "PushContext"]
