"""Reference implementations of momentum look-ahead; the legend is that of `tests.support.reference`.

``G`` is a push as it enters the recursion, ``gamma`` the outer learning rate and ``mu`` the momentum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tests.support.reference import Gradient, Values, kept_at
from tests.support.reference_batching import LocalMoves
from tests.support.schedule import Step


class MLA(LocalMoves):
    """After T pushes ``m = (1 - mu) sum of mu^(T-1-s) G_s`` and ``w = w_0 - gamma sum of (1 + mu (1 - mu^(T-s))) G_s``.

    Corrected, ``G`` is at the rate 1 and each of these steps at the rate of its iteration.
    """

    def state(self, history: Sequence[Step]) -> Values:
        gradients = self.gradients(history)
        pushes = self.pushes(gradients)
        gamma = self.options.get("outer_lr", 0.7)
        if not self.corrected:
            weights = [gamma * (1 + self.beta * (1 - self.beta ** (len(pushes) - s))) for s in range(len(pushes))]
            return {"w": self.start - weighted(pushes, weights, self.start), "m": self.m(pushes)}
        w = self.start
        for g in gradients:
            w = w - gamma * g.eta * (pushes[g.t] + self.beta * self.m(pushes[: g.t + 1]))
        return {"w": w, "m": kept_at(gradients) * self.m(pushes)}

    def m(self, pushes: Sequence[Tensor]) -> Tensor:
        """Return the momentum after these pushes."""
        weights = [(1 - self.beta) * self.beta ** (len(pushes) - 1 - s) for s in range(len(pushes))]
        return weighted(pushes, weights, self.start)

    def pushes(self, gradients: Sequence[Gradient]) -> list[Tensor]:
        """Return what enters the recursion, at the rate 1 where it is corrected."""
        return [g.value_D / ((self.lr(g.i) or 1.0) if self.corrected else 1.0) for g in gradients]


class HeLoCo(MLA):
    """`MLA` on pushes of which each tensor was corrected by the angle between it and ``m``."""

    def pushes(self, gradients: Sequence[Gradient]) -> list[Tensor]:
        sizes = [math.prod(shape) for shape in self.shapes]
        corrected: list[Tensor] = []
        for push in super().pushes(gradients):
            parts = zip(push.split(sizes), self.m(corrected).split(sizes), strict=True)
            corrected.append(torch.cat([self.correct(D, m) for D, m in parts]))
        return corrected

    def correct(self, D: Tensor, m: Tensor) -> Tensor:
        """Return one tensor's part, corrected."""
        if not D.any() or not m.any():
            return D
        length, other = float(D @ D) ** 0.5, float(m @ m) ** 0.5
        cosine = float(D @ m) / (length * other)
        confidence = length / (length + self.options.get("momentum_weight", 3.0) * other)
        if cosine >= self.options.get("cosine_ok", 0.2):
            return D
        if cosine < 0:
            share = min(self.options.get("shrink", 0.5) * -cosine * confidence, 0.5)
            return D - share * float(D @ m) / other**2 * m
        share = min((1 - cosine) * confidence, 1.0)
        turned = (1 - share) * D / length + share * m / other
        return length * turned / float(turned @ turned) ** 0.5


def weighted(values: Sequence[Tensor], weights: Sequence[float], like: Tensor) -> Tensor:
    """Return a weighted sum of vectors, shape (D,); zero for none."""
    return sum((weight * value for weight, value in zip(weights, values, strict=True)), torch.zeros_like(like))
