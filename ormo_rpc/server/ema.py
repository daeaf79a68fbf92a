"""An exponential moving average of the parameters, for evaluations; no worker is ever sent it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class Ema:
    """``e <- d e + (1 - d) w`` after each applied gradient, where ``d`` is the decay and ``w`` are the new parameters.

    The bits are those of ``torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(d))`` that is updated
    after each gradient. As there, the first one makes the average equal to its parameters; before it the average is ``w_0``.
    So ``w_0`` has no part in it, unless that gradient leaves ``w`` where it is: the rate is 0, or the algorithm steps once in n
    gradients, as `m_sync` does, where ``d^n`` is the decay of a step. What `Algorithm.flush` adds in the end is not averaged.

    One pass over memory for each gradient: two vectors are read and one is written, under the server's lock.

    Args:
        decay: ``d``, in (0, 1).
        params: ``w_0``, shape (D,); copied.
    """

    def __init__(self, decay: float, params: torch.Tensor) -> None:
        self.decay = decay
        self._begin(params)

    def update(self, params: torch.Tensor) -> None:
        """Take in the parameters that a gradient has led to, shape (D,)."""
        if self._gradients == 0:
            self._average.copy_(params)
        else:
            self._average.lerp_(params, 1 - self.decay)
        self._gradients += 1

    def copy(self) -> torch.Tensor:
        """Return the average as it is now, shape (D,), in memory of its own."""
        return self._average.clone()

    def state_dict(self) -> dict[str, Any]:
        """Return a private copy, of tensors and plain values."""
        return {"params": self.copy(), "gradients": self._gradients}

    def load_state_dict(self, state: Mapping[str, Any] | None, params: torch.Tensor) -> None:
        """Restore what `state_dict` returned, by an average with another decay too.

        Args:
            state: None where the run had no average so far: it begins with the next gradient.
            params: The parameters that were loaded beside it.
        """
        if state is None:
            self._begin(params)
        else:
            self._average = state["params"].to(params.device, copy=True)
            self._gradients = state["gradients"]

    def _begin(self, params: torch.Tensor) -> None:
        self._average = params.detach().clone()
        self._gradients = 0
