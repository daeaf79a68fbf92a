"""No synchronisation."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from typing_extensions import override

from ormo_rpc.options import register
from ormo_rpc.schedulers.base import Scheduler


@register("async")
@dataclass(kw_only=True)
class Async(Scheduler):
    """Every worker is answered at once."""

    IMMEDIATE = True

    @override
    def due(self, blocked: Collection[int], holding: Collection[int]) -> list[int]:
        return list(blocked)
