"""No logger: the run directory has everything."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from ormo_rpc.loggers.base import Logger, RunInfo, RunLog
from ormo_rpc.options import register


@register("none")
@dataclass(frozen=True, kw_only=True)
class NoLogger(Logger):
    """Log nothing besides the run directory."""

    @override
    def start(self, run: RunInfo) -> RunLog:
        return RunLog()
