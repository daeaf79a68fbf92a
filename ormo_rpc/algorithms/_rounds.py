"""Rounds: one push of each worker, all taken at the same parameters, and one step with their mean."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.algorithms.base import Algorithm, PushContext


@dataclass(kw_only=True)
class Rounds(Algorithm):
    """Synchronous rounds: a push that was taken at the present parameters is accepted, and its worker held until the step.

    A round ends with the m-th push, or when every member has brought one, or none computes any more. Joining workers take part
    in the present round. The push of a worker that leaves counts; one that joins under its number is a new worker. A server
    that restarts goes on with the round as it was: workers that have brought a push are still held. Buffers are those of the
    accepted pushes.

    Attributes:
        collected: The sum of the pushes of this round, shape (D,).
        count: Their number.
        brought: Present workers that have brought one.
    """

    FRESH = True
    REFUSES_MEAN_LR = "its step is with the mean of a round already"
    NEEDS_IMMEDIATE_REPLIES = "its rounds decide themselves who waits for whom; use async"
    REFUSES_PREFETCH = "its rounds wait for all tickets, those ahead as well"

    @property
    def round_size(self) -> int | None:
        """m, the pushes that make a round; None for those of all workers."""
        return None

    @override
    def init(self, params: torch.Tensor, momentum: float) -> None:
        super().init(params, momentum)
        self.collected = torch.zeros_like(params)
        self.count = 0
        self.brought: dict[int, int] = {}

    @abstractmethod
    def advance(self, mean: torch.Tensor, lr: float) -> None:
        """Make the step of a round, whose pushes have this mean, shape (D,)."""

    @override
    def accepts(self, context: PushContext) -> bool:
        return context.version == self.version

    @override
    def held(self) -> Collection[int]:
        return self.brought

    @override
    def step(self, grad: torch.Tensor, lr: float, context: PushContext) -> None:
        self.collected.add_(grad)
        self.count += 1
        self.brought[context.worker] = 1
        if self.count == self.round_size or len(self.brought) >= context.concurrency:
            self.flush(lr)

    @override
    def flush(self, lr: float) -> None:
        if self.count:
            self.advance(self.collected.div_(self.count), lr)
            self.collected.zero_()
            self.count = 0
            self.brought.clear()
            self.version += 1

    @override
    def leave(self, worker: int) -> None:
        self.brought.pop(worker, None)

    @override
    def state_dict(self) -> Mapping[str, torch.Tensor | int | float]:
        counts = {"count": self.count, "version": self.version}
        return {"collected": self.collected, **counts, **self.by_worker("brought", self.brought)}
