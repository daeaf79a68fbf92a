"""Ordered momentum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.algorithms._momentum import StepMomentum
from ormo_rpc.algorithms.base import PushContext
from ormo_rpc.kernels.steps import OrMoStep
from ormo_rpc.options import register


@register("ormo")
@dataclass(kw_only=True)
class OrMo(StepMomentum):
    """OrMo: every gradient enters the momentum with the weight of its place in the order of iterations.

    State ``w``, momentum ``u`` (in units of the parameters: it sums ``eta g``), momentum index ``I``. For a gradient ``g``
    taken at an index of bucket ``b``:

    1. *momentum shift*: while ``I`` is smaller than the largest bucket handed out so far,
       ``w <- w - beta u; u <- beta u; I <- I + 1``;
    2. with ``e = I - b >= 0``: ``u <- u + beta^e eta g; w <- w - (1 - beta^(e+1)) / (1 - beta) eta g``.

    A worker that returns at once has ``e = 0``; a late gradient enters with the weight that it would have had by now, and the
    parameters get at once the geometric sum that they missed. Under the synchronous scheduler this is heavy ball on the sum of
    the K gradients (SSGDm); with ``beta = 0`` it is `asgd` bit for bit. Memory: ``w, u``, two vectors of D.

    ``eta`` is inside of the momentum. Where it is corrected (see `StepMomentum`), ``u <- u eta_new / eta_old`` comes before
    step 1, so that K = 1 equals ``torch.optim.SGD`` for any schedule; the paper's ``u`` keeps the old rates.

    Source: Shi, Yang, Li, NeurIPS 2024, arXiv 2407.19234, Algorithm 2. Departure: the paper shifts when the waiting set is
        empty and ``ceil(t/K) > I`` (reconstructed); "largest bucket handed out" is equal to that under `async` and `sync`,
        and right where K changes too.
    """

    OUT_OF_PLACE = True

    @override
    def init(self, params: torch.Tensor, momentum: float) -> None:
        super().init(params, momentum)
        self.u = torch.zeros_like(params)
        self.index = 0

    @override
    def advance(self, grad: torch.Tensor, lr: float, scale: float, context: PushContext) -> None:
        shifts = max(0, context.newest_bucket - self.index)
        self.index += shifts
        exponent = self.index - context.bucket
        step = OrMoStep(
            scale=scale,
            shifts=shifts,
            beta=self.momentum,
            u_scale=self.momentum**exponent * lr,
            w_scale=self._reach(exponent) * lr,
        )
        self.params = self.kernel.apply(step, grad, self.params, self.u)

    def _reach(self, exponent: float) -> float:
        """Return ``1 + beta + ... + beta^exponent``: the weight in the parameters of a gradient that is so many buckets old."""
        return (1 - self.momentum ** (exponent + 1)) / (1 - self.momentum)

    @override
    def state_dict(self) -> Mapping[str, torch.Tensor | int | float]:
        return {"u": self.u, "index": self.index, **super().state_dict()}
