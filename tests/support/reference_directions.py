"""A reference implementation of steps by the directions of a momentum; the legend is that of `tests.support.reference`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ormo_rpc.algorithms.ringmaster_lmo import Lmo
from tests.support.reference import Gradient, Values
from tests.support.reference_batching import Ringmaster
from tests.support.schedule import Step


class RingmasterLMO(Ringmaster):
    """``m = (1 - beta) sum of beta^(n-1-t) g``, and ``w = w_0 - sum of eta d(m)``, d by singular value decomposition.

    The iteration acts on each singular value alone: ``s <- a s + b s^3 + c s^5`` from ``s / |m|``.
    """

    def state(self, history: Sequence[Step]) -> Values:
        gradients = self.gradients(history)
        momenta = self.momenta(gradients)
        w = self.start
        for g, m in zip(gradients, momenta, strict=True):
            w = w - g.eta * torch.cat([self.direction(part.view(s)).flatten() for part, s in self.parts(m)])
        return {"w": w, "m": momenta[-1] if momenta else torch.zeros_like(self.start)}

    def momenta(self, gradients: Sequence[Gradient]) -> list[Tensor]:
        """Return the momentum after each gradient."""
        weights = [(1 - self.beta) * self.beta**age for age in range(len(gradients))]
        return [self.total(gradients[: n + 1], weights[n::-1]) for n in range(len(gradients))]

    def parts(self, vector: Tensor) -> list[tuple[Tensor, tuple[int, ...]]]:
        """Return the part of each tensor, with its shape."""
        return list(zip(vector.split([math.prod(shape) for shape in self.shapes]), self.shapes, strict=True))

    def direction(self, m: Tensor) -> Tensor:
        """Return the step of one tensor without ``eta``."""
        if m.dim() < 2 or self.options.get("lmo") is Lmo.identity:
            return m
        u, s, v = torch.linalg.svd(m.flatten(1), full_matrices=False)
        s = s / s.square().sum().sqrt()
        for _ in range(self.options.get("newton_schulz_steps", 5)):
            s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
        return (max(1, len(m) / m[0].numel()) ** 0.5 * u * s @ v).view_as(m)

    def scale(self, history: Sequence[Step]) -> float:
        """Bound the numbers that are rounded: a step multiplies an error of ``m / |m|`` by up to 3.4445^5 = 485."""
        gradients = self.gradients(history)
        largest = max((float(g.value_D.abs().max()) for g in gradients), default=1.0)
        matrices = [part for m in self.momenta(gradients) for part, shape in self.parts(m) if len(shape) > 1]
        return super().scale(history) + 500 * sum(1 + largest / float(each.norm()) for each in matrices)
