"""Ordered momentum whose workers look ahead, with a delay-adaptive learning rate."""

from __future__ import annotations

from dataclasses import dataclass

from ormo_rpc.algorithms._delay_adaptive import DelayAdaptive
from ormo_rpc.algorithms.ormo_la import OrMoLA
from ormo_rpc.options import register


@register("ormo_la_da")
@dataclass(kw_only=True)
class OrMoLADA(DelayAdaptive, OrMoLA):
    """OrMo with look-ahead whose learning rate falls for a gradient that comes very late.

    Recursion: as `OrMoLA` with the rate ``eta`` of `OrMoDA`, and its options. A gradient that ``rule=drop`` discards does not
    count in its worker's mean delay. Memory: ``w, u``, two vectors of D.

    Raises:
        ValueError: ``threshold`` or ``smoothness`` is given, and ``rule`` does not use it.

    Source: ours.
    """
