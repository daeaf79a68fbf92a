"""Asynchronous SGD with a delay-adaptive learning rate."""

from __future__ import annotations

from dataclasses import dataclass

from ormo_rpc.algorithms._delay_adaptive import DelayAdaptive
from ormo_rpc.algorithms.asgd import ASGD
from ormo_rpc.options import register


@register("asgd_da")
@dataclass(kw_only=True)
class ASGDDA(DelayAdaptive, ASGD):
    """ASGD-DA: asynchronous SGD whose learning rate falls for a gradient that comes very late.

    Recursion: ``w <- w - eta(tau) g``, where ``eta(tau)`` is chosen by ``rule``, see `DelayRule`; the default is that of
    `ormo_da`, so that the two differ in momentum alone. Memory: ``w``, one vector of D. The momentum is not read. K is that of
    the moment when the gradient arrives, so it may change. The threshold of ``koloskova`` and ``drop`` is the concurrency, as
    published, here K; that of ``ormo`` is 2 K.

    Raises:
        ValueError: ``threshold`` or ``smoothness`` is given, and ``rule`` does not use it.

    Source: Koloskova, Stich, Jaggi 2022, arXiv 2206.08307 (``koloskova``, ``drop``); Mishchenko, Bach, Even, Woodworth 2022,
        arXiv 2206.07638 (``mishchenko``); the baseline ASGD with delay-adaptive rate of arXiv 2407.19234. Reconstructed: the
        default, ``ormo`` without ``smoothness``, see `ormo_da`.
    """
