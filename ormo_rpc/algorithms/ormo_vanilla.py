"""Ordered momentum with a vanilla SGD step (the paper's ablation)."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from ormo_rpc.algorithms.ormo import OrMo
from ormo_rpc.options import register


@register("ormo_vanilla")
@dataclass(kw_only=True)
class OrMoVanilla(OrMo):
    """OrMo whose late gradients move the parameters as plain SGD would: the ablation of the paper.

    Recursion: as `OrMo`, but step 2 is ``u <- u + beta^e eta g; w <- w - eta g``: the parameters do not get the part of the
    geometric sum that a late gradient missed. Memory: ``w, u``, two vectors of D.

    Source: arXiv 2407.19234, "OrMo (vanilla SGD step)". Reconstructed: the momentum ``u`` is taken to be as in OrMo.
    """

    @override
    def _reach(self, exponent: float) -> float:
        return 1.0
