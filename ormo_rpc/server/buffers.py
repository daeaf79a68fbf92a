"""Running averages of batch-norm statistics, over the batches in the order in which their pushes are applied."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ormo_rpc.messages import NO_BUFFERS


class RunningBuffers:
    """The running average of the buffers in the pushes.

    Recursion, for each buffer: ``average <- (1 - m) average + m batch`` with the layer's own ``momentum`` m, or
    ``m = 1 / n`` for its n-th batch where that momentum is None (torch's cumulative average).

    Args:
        initial: The buffers at the start by name; copied.
        momentum: m by name.
    """

    def __init__(self, initial: Mapping[str, Tensor], momentum: Mapping[str, float | None]) -> None:
        self.average = {name: value.detach().clone() for name, value in initial.items()}
        self.momentum = dict(momentum)
        self.updates = 0
        self._snapshot: Tensor | None = None

    def update(self, batch: Mapping[str, Tensor]) -> None:
        """Average in the statistics of one batch, of the same names and shapes."""
        self.updates += 1
        self._snapshot = None
        for name, average in self.average.items():
            momentum = self.momentum[name]
            weight = 1 / self.updates if momentum is None else momentum
            average.mul_(1 - weight).add_(batch[name].detach(), alpha=weight)

    def snapshot(self) -> Tensor:
        """Return the averages as bytes (uint8), shape (B,), which never change: replies share them until the next update."""
        if not self.average:
            return NO_BUFFERS
        if self._snapshot is None:
            self._snapshot = torch.cat([value.reshape(-1).view(torch.uint8) for value in self.average.values()])
        return self._snapshot

    def copy(self) -> dict[str, Tensor]:
        """Return a private copy of the averages by name."""
        return {name: value.clone() for name, value in self.average.items()}

    def state_dict(self) -> dict[str, Tensor | int]:
        """Return a private copy."""
        return {"updates": self.updates, **{f"average.{name}": value.clone() for name, value in self.average.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor | int]) -> None:
        """Restore what `state_dict` returned."""
        self._snapshot = None
        self.updates = int(state["updates"])
        for name, average in self.average.items():
            average.copy_(torch.as_tensor(state[f"average.{name}"]))
