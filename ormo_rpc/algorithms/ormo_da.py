"""Ordered momentum with a delay-adaptive learning rate."""

from __future__ import annotations

from dataclasses import dataclass

from ormo_rpc.algorithms._delay_adaptive import DelayAdaptiveOptions, delay_adaptive_accepts, delay_adaptive_lr
from ormo_rpc.algorithms.base import PushContext
from ormo_rpc.algorithms.ormo import OrMo
from ormo_rpc.options import option


class OrMoDA(OrMo):
    """OrMo-DA: OrMo whose learning rate falls for a gradient that comes very late.

    Recursion: as `OrMo` with ``eta`` replaced by ``eta`` if ``tau <= 2 K``, otherwise ``min(eta, 1 / (4 L tau))`` where the
    smoothness L is given, else ``eta 2 K / tau``, which is continuous at the threshold. Memory: ``w, u``, two vectors of D.

    Source: arXiv 2407.19234, Algorithm 3 (OrMo-DA); the form with L is that of the theorem. Reconstructed: the form without
        L, as the algorithm of the paper's experiments is not known. Further published algorithms are chosen by ``algorithm``, see
        `DelayRule`.
    """

    NAME = "ormo_da"

    @dataclass(frozen=True, kw_only=True)
    class Options(OrMo.Options, DelayAdaptiveOptions):
        """Options of ordered momentum and of the delay-adaptive learning rate."""

        name: str = option("ormo_da", "ordered momentum with a delay-adaptive learning rate")

    def accepts(self, context: PushContext) -> bool:
        """Always, but for ``algorithm=drop`` past the threshold."""
        return delay_adaptive_accepts(self.options, context)

    def learning_rate(self, context: PushContext) -> float:
        """The scheduled learning rate, reduced where the delay is past the threshold."""
        return delay_adaptive_lr(self.options, context)
