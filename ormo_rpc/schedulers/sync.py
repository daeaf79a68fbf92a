"""Rounds of all workers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from typing_extensions import override

from ormo_rpc.options import register
from ormo_rpc.schedulers.base import Scheduler


@register("sync")
@dataclass(kw_only=True)
class Sync(Scheduler):
    """All workers are answered together, when all have pushed, as in synchronous data-parallel SGD (with ormo: SSGDm)."""

    BARRIER = True
    WHOLE_ROUNDS = True

    @override
    def due(self, blocked: Collection[int], holding: Collection[int]) -> list[int]:
        return [] if holding else list(blocked)
