"""Rounds of some workers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from typing_extensions import override

from ormo_rpc.options import at_least_one, option, register
from ormo_rpc.schedulers.base import Scheduler


@register("partial")
@dataclass(kw_only=True)
class Partial(Scheduler):
    """Workers are answered together, as soon as k of them are blocked or nobody is left to wait for."""

    BARRIER = True

    k: int = option(2, "how many workers are answered together", valid=at_least_one, expected="a whole number >= 1")

    @property
    @override
    def round_size(self) -> int:
        return self.k

    @override
    def due(self, blocked: Collection[int], holding: Collection[int]) -> list[int]:
        return list(blocked) if len(blocked) >= self.k or not holding else []
