"""Stale synchronous parallel."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.options import not_negative, option, register
from ormo_rpc.schedulers.base import Scheduler


@register("ssp")
@dataclass(kw_only=True)
class SSP(Scheduler):
    """Stale synchronous parallel: a worker is blocked while it is more than s tickets ahead of the slowest one.

    A worker's clock counts its pushes that were applied or discarded; the clock of one that joins starts at the lowest. A
    worker that is idle, with neither a ticket nor an answer to wait for, holds nobody back.

    Source: Ho et al. 2013 (NIPS 26).
    """

    s: int = option(3, "tickets that a worker may be ahead", valid=not_negative, expected="a whole number >= 0")

    @override
    def init(self, generator: torch.Generator) -> None:
        super().init(generator)
        self.clocks: dict[int, int] = {}

    @override
    def due(self, blocked: Collection[int], holding: Collection[int]) -> list[int]:
        slowest = min((self.clocks[worker] for worker in (*blocked, *holding)), default=0)
        return [worker for worker in blocked if self.clocks[worker] - slowest <= self.s]

    @override
    def start(self, workers: Collection[int]) -> None:
        self.clocks = dict.fromkeys(workers, 0)

    @override
    def join(self, worker: int) -> None:
        self.clocks[worker] = min(self.clocks.values(), default=0)

    @override
    def leave(self, worker: int) -> None:
        del self.clocks[worker]

    @override
    def settle(self, worker: int) -> None:
        self.clocks[worker] += 1

    @override
    def state_dict(self) -> dict[int, int]:
        return dict(self.clocks)

    @override
    def load_state_dict(self, state: Mapping[int, int]) -> None:
        self.clocks = dict(state)
