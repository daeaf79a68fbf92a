"""Asynchronous SGD that divides the learning rate by the delay."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from ormo_rpc.algorithms.asgd import ASGD
from ormo_rpc.algorithms.base import PushContext
from ormo_rpc.options import register


@register("staleness_aware")
@dataclass(kw_only=True)
class StalenessAware(ASGD):
    """Staleness-aware ASGD: a gradient counts in inverse proportion to its delay.

    Recursion: ``w <- w - eta / max(tau, 1) g``. Memory: ``w``, one vector of D. The momentum is not read. K is not used, so it
    may change; as ``tau`` is K - 1 where all workers are equally fast, the learning rate falls with K.

    Source: Zhang, Gupta, Lian, Liu, IJCAI 2016, arXiv 1511.05950. Departure: the paper averages the gradients of ``c`` workers
        before each step; here c = 1, its softsync with as many groups as workers. Schedulers that answer in rounds are refused.
    """

    NEEDS_NO_BARRIER = (
        "all gradients of a round were taken at the same parameters, so one age is right for all and the delay says nothing; "
        "use async or ssp"
    )

    @override
    def learning_rate(self, context: PushContext) -> float:
        return context.lr / max(context.delay, 1)
