"""Ringmaster ASGD with the momentum's direction as the step: asynchronous Muon."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from typing_extensions import override

from ormo_rpc.algorithms._momentum import GradientMomentum
from ormo_rpc.algorithms.base import PushContext
from ormo_rpc.algorithms.ringmaster import Ringmaster
from ormo_rpc.options import at_least_one, option, register

QUINTIC = (3.4445, -4.7750, 2.0315)
"""a, b, c of ``X <- a X + b (X X') X + c (X X')^2 X``, which takes singular values in (0, 1] to near 1 in few steps."""


class Lmo(Enum):
    """The linear minimisation oracle: the step for a momentum, per tensor of two or more dimensions."""

    spectral = "spectral"
    """The momentum with all singular values near 1, over the ball of the spectral norm."""
    identity = "identity"
    """The momentum itself, as for the other tensors."""


@register("ringmaster_lmo")
@dataclass(kw_only=True)
class RingmasterLMO(Ringmaster, GradientMomentum):
    """Asynchronous Muon: Ringmaster's rule for delays, and steps of a size that gradients do not change.

    Recursion, for a gradient ``g`` of delay ``tau < R``: ``m <- beta m + (1 - beta) g``; then for each tensor of the model

    * of two or more dimensions, as a matrix of its first dimension's rows (a convolution flattened):
      ``w <- w - eta sqrt(max(1, rows / columns)) NS(m)``;
    * of fewer dimensions, and with ``lmo=identity`` of any: ``w <- w - eta m``.

    ``NS`` divides by the Frobenius norm and takes ``newton_schulz_steps`` steps of the Newton-Schulz iteration of fifth order,
    in the dtype of the parameters: singular values end near 1 (0.7 to 1.2), but for those that are very small against the
    norm. So the scale of ``g`` does not matter there, and ``eta`` is the size of a step. A gradient whose delay reaches R is
    discarded, does not advance ``t``, and its ticket is issued again.

    ``eta`` is outside of the momentum, see `GradientMomentum`; it may differ between parameters (``train.lr_factors``). The
    weight decay is decoupled, ``w <- (1 - eta lambda) w`` before each step, as the size of a gradient says nothing. With
    ``lmo=identity`` and R beyond all delays it is `naive` at ``eta (1 - beta)``, but for the decay. With one worker it is
    ``torch.optim.Muon(nesterov=False)``, which iterates in bfloat16. Memory: ``w, m``, two
    vectors of D, and during a step one more and a few of the largest tensor.

    Source: arXiv 2605.18174; Ringmaster is arXiv 2501.16168, and the coefficients of the iteration are those of Muon (Jordan
        et al. 2024). Departures: R is ``2 K`` where it is not given, as in `ringmaster`; tensors of fewer than two dimensions
        take a plain step, and no matrix is an exception, where users of Muon give embeddings and the last layer to AdamW.
    """

    DECAYS_ITSELF = True

    newton_schulz_steps: int = option(
        5, "steps of the iteration that brings singular values near 1", valid=at_least_one, expected="a whole number >= 1"
    )
    lmo: Lmo = option(Lmo.spectral, "the step for tensors of two or more dimensions: spectral, or identity (no Muon)")

    @override
    def init(self, params: torch.Tensor, momentum: float) -> None:
        super().init(params, momentum)
        self.m = torch.zeros_like(params)

    @override
    def step(self, grad: torch.Tensor, lr: float, context: PushContext) -> None:
        self.m.mul_(self.momentum).add_(grad, alpha=1 - self.momentum)
        move = self.m if self.lmo is Lmo.identity else self._directions()
        for group in self.groups:
            rate, params = lr * group.lr_factor, group.of(self.params)
            if rate * group.weight_decay:
                params.mul_(1 - rate * group.weight_decay)
            params.sub_(group.of(move), alpha=rate)

    def _directions(self) -> torch.Tensor:
        """Return the steps of all tensors for the present momentum, shape (D,), without ``eta``."""
        move = self.m.clone()
        for each in self.tensors(move):
            if each.dim() > 1 and each.numel():
                matrix = each.view(len(each), -1)
                rows, columns = matrix.shape
                matrix.copy_(orthogonalised(matrix, self.newton_schulz_steps).mul_(max(1.0, rows / columns) ** 0.5))
        return move

    @override
    def state_dict(self) -> Mapping[str, torch.Tensor | int | float]:
        return {"m": self.m}


def orthogonalised(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """Return a matrix with singular values near 1 in place of those of the given one; zero for zero.

    Args:
        matrix: Of any shape (rows, columns); the iteration runs on the smaller side.
        steps: The number of steps.
    """
    largest = matrix.abs().max()
    if not largest:
        return torch.zeros_like(matrix)
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.T) / largest  # so that no square underflows
    x = x / torch.linalg.vector_norm(x)
    a, b, c = QUINTIC
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.T
