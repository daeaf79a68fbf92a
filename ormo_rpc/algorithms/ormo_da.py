"""Ordered momentum with a delay-adaptive learning rate."""

from __future__ import annotations

from dataclasses import dataclass

from ormo_rpc.algorithms._delay_adaptive import DelayAdaptive
from ormo_rpc.algorithms.ormo import OrMo
from ormo_rpc.options import register


@register("ormo_da")
@dataclass(kw_only=True)
class OrMoDA(DelayAdaptive, OrMo):
    """OrMo-DA: OrMo whose learning rate falls for a gradient that comes very late.

    Recursion: as `OrMo` with ``eta`` replaced by ``eta`` if ``tau <= 2 K``, otherwise ``min(eta, 1 / (4 L tau))`` where the
    smoothness L is given, else ``eta 2 K / tau``, which is continuous at the threshold. ``momentum_correction`` follows the
    scheduled learning rate, not the adapted one. Memory: ``w, u``, two vectors of D.

    Raises:
        ValueError: ``threshold`` or ``smoothness`` is given, and ``rule`` does not use it.

    Source: arXiv 2407.19234, Algorithm 3 (OrMo-DA); the form with L is that of the theorem. Reconstructed: the form without
        L, as the rule of the paper's experiments is not known. Further published rules are chosen by ``rule``, see `DelayRule`.
    """
