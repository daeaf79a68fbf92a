"""Asynchronous SGD with a delay-adaptive learning rate."""

from __future__ import annotations

from dataclasses import dataclass

from ormo_rpc.algorithms._delay_adaptive import DelayAdaptiveOptions, delay_adaptive_accepts, delay_adaptive_lr
from ormo_rpc.algorithms.asgd import ASGD
from ormo_rpc.algorithms.base import PushContext
from ormo_rpc.options import option


class ASGDDA(ASGD):
    """ASGD-DA: asynchronous SGD whose learning rate falls for a gradient that comes very late.

    Recursion: ``w <- w - eta(tau) g``, where ``eta(tau)`` is chosen by ``algorithm``, see `DelayRule`; the default is that of
    `ormo_da`, so that the two differ in momentum alone. Memory: ``w``, one vector of D. The momentum is not read. K is that of
    the moment when the gradient arrives, so it may change.

    Source: Koloskova, Stich, Jaggi 2022, arXiv 2206.08307 (``koloskova``, ``drop``); Mishchenko, Bach, Even, Woodworth 2022,
        arXiv 2206.07638 (``mishchenko``); the baseline ASGD with delay-adaptive rate of arXiv 2407.19234. Reconstructed: the
        default, ``ormo`` without ``smoothness``, see `ormo_da`.
    """

    NAME = "asgd_da"

    @dataclass(frozen=True, kw_only=True)
    class Options(ASGD.Options, DelayAdaptiveOptions):
        """Options of the delay-adaptive learning rate."""

        name: str = option("asgd_da", "asynchronous SGD with a delay-adaptive learning rate, no momentum")

    def accepts(self, context: PushContext) -> bool:
        """Always, but for ``algorithm=drop`` past the threshold."""
        return delay_adaptive_accepts(self.options, context)

    def learning_rate(self, context: PushContext) -> float:
        """The scheduled learning rate, reduced where the delay is past the threshold."""
        return delay_adaptive_lr(self.options, context)
