"""AdamW in order of arrival with a delay-adaptive learning rate."""

from __future__ import annotations

from dataclasses import dataclass

from ormo_rpc.algorithms._delay_adaptive import DelayAdaptive
from ormo_rpc.algorithms.adamw import AdamW
from ormo_rpc.options import register


@register("adamw_da")
@dataclass(kw_only=True)
class AdamWDA(DelayAdaptive, AdamW):
    """AdamW-DA: `adamw` whose learning rate falls for a gradient that comes very late.

    Recursion: that of `adamw` with ``eta(tau)`` chosen by ``rule``, see `DelayRule`; the default is that of `ormo_da`. The rate
    multiplies the decay of the same step too. A late gradient enters ``m`` and ``v`` with its full weight. A gradient that
    ``rule=drop`` discards is no step. Memory: ``w, m, v``, three vectors of D. K is that of the moment when the gradient
    arrives, so it may change.

    Raises:
        ValueError: ``threshold`` or ``smoothness`` is given, and ``rule`` does not use it.

    Source: `adamw`, and the rules of `asgd_da`, which were published for SGD: their theory says nothing about Adam.
    """
