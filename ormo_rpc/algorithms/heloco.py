"""Momentum look-ahead that corrects each tensor of a push first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.algorithms._mla import MomentumLookAhead
from ormo_rpc.options import not_negative, option, register


@register("heloco")
@dataclass(kw_only=True)
class HeLoCo(MomentumLookAhead):
    """HeLoCo: `mla` whose server first corrects each tensor of a push that does not go with the momentum.

    For the part ``D`` of a push in one tensor of the model and the part ``m`` of the momentum before it, with
    ``c = cos(D, m)``, ``d = D / |D|``, ``v = m / |m|`` and the confidence ``f = |D| / (|D| + kappa |m|)``:

    * ``c >= c_ok``, or ``D`` or ``m`` is 0: as it is;
    * ``c < 0``: ``D - b c |D| v`` with ``b = min(-k_s c f, b_max)``: a part of what is opposed to the momentum goes;
    * else ``|D| u / |u|`` with ``u = (1 - l) d + l v``, ``l = min(k_d (1 - c) f, 1)``: turned towards it, as long as before.

    What comes out is `mla`'s ``G``. With ``c_ok = -1`` it is `mla` to the bit. The correction scales with ``D`` and ``m``
    together, so a factor of the learning rate remains one. Memory: ``w, m``, two vectors of D, and two more during a step.

    Source: arXiv 2606.00271. Departures: those of `mla`, and no constant is added to the denominator of ``f``.
    """

    cosine_ok: float = option(
        0.2,
        "c_ok, the cosine to the momentum from which on a tensor's part of a push is left as it is; -1: always",
        valid=lambda v: -1 <= v <= 1,
        expected="a number in [-1, 1]",
    )
    shrink: float = option(
        0.5,
        "k_s, how strongly a part that is opposed to the momentum is cut",
        valid=not_negative,
        expected="a finite number >= 0",
    )
    largest_shrink: float = option(
        0.5, "b_max, the largest share of it that goes", valid=lambda v: 0 <= v <= 1, expected="a number in [0, 1]"
    )
    turn: float = option(
        1.0,
        "k_d, how strongly one that is nearly at a right angle is turned",
        valid=not_negative,
        expected="a finite number >= 0",
    )
    momentum_weight: float = option(
        3.0,
        "kappa, how much the momentum's length takes from the confidence in a push",
        valid=not_negative,
        expected="a finite number >= 0",
    )

    @override
    def corrected(self, moved: torch.Tensor) -> torch.Tensor:
        corrected = moved.clone()
        for part, momentum in zip(self.tensors(corrected), self.tensors(self.m), strict=True):
            self._correct(part.view(-1), momentum.view(-1))
        return corrected

    def _correct(self, part: torch.Tensor, momentum: torch.Tensor) -> None:
        """Correct one tensor of a push, in place."""
        size, momentum_size = (torch.linalg.vector_norm(each, dtype=torch.float64).item() for each in (part, momentum))
        if not size or not momentum_size:
            return
        ahead = momentum / momentum_size
        cosine = max(-1.0, min(1.0, torch.dot(part / size, ahead).item()))
        if cosine >= self.cosine_ok:
            return
        confidence = size / (size + self.momentum_weight * momentum_size)
        if cosine < 0:
            part.sub_(ahead, alpha=min(-self.shrink * cosine * confidence, self.largest_shrink) * cosine * size)
            return
        turned = min(self.turn * (1 - cosine) * confidence, 1.0)
        part.div_(size).mul_(1 - turned).add_(ahead, alpha=turned)
        part.mul_(size / torch.linalg.vector_norm(part, dtype=torch.float64).item())
