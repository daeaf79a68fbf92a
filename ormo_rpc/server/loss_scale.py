"""The loss scale of float16: workers multiply the loss by it, so that small gradients do not become zero."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

INITIAL = 65536.0
"""The scale at the beginning."""
INTERVAL = 2000
"""Gradients without an overflow after which the scale grows."""
GROWTH = 2.0
BACKOFF = 0.5
SMALLEST = 2.0**-10
"""A run in which gradients overflow at every scale down to it has diverged: far below 1, it is not the scale that overflows."""


@dataclass(kw_only=True, slots=True)
class LossScale:
    """The scale, by the rule of ``torch.amp.GradScaler`` in the order in which gradients are applied.

    It doubles after `interval` applied gradients in a row, and halves where a gradient is not finite. K workers compute at
    scales that were sent to them earlier. So an overflow at ``S`` lowers the scale to ``S / 2``, unless it is that small
    already, and further overflows at ``S`` change nothing; a gradient counts towards growth if its own scale was at least the
    present one. With one worker each gradient has the present scale, and this is what a `GradScaler` does.

    Attributes:
        initial: The scale at the beginning.
        interval: The number of gradients after which it grows.
        value: The scale, a float32.
        finite: Gradients applied at this scale, or at a larger one, since it last changed.
    """

    initial: float = INITIAL
    interval: int = INTERVAL
    value: float = field(init=False)
    finite: int = field(init=False)

    def __post_init__(self) -> None:
        if not SMALLEST <= _single(self.initial) < math.inf:
            raise ValueError(f"loss_scale: initial: got {self.initial}, expected a float32 >= {SMALLEST:.17g}")
        if self.interval < 1:
            raise ValueError(f"loss_scale: interval: got {self.interval}, expected at least 1")
        self.restart()

    def restart(self) -> None:
        """Begin anew."""
        self.value, self.finite = _single(self.initial), 0

    @property
    def exhausted(self) -> bool:
        """True where gradients have overflowed at every scale down to `SMALLEST`."""
        return self.value < SMALLEST

    def applied(self, used: float) -> None:
        """Count a gradient that was computed at the scale ``used`` and is applied."""
        if used < self.value:
            return
        self.finite += 1
        if self.finite >= self.interval:
            grown = _single(self.value * GROWTH)
            self.value, self.finite = grown if grown < math.inf else self.value, 0

    def overflowed(self, used: float) -> None:
        """Note that a gradient which was computed at the scale ``used`` is not finite."""
        lowered = _single(used * BACKOFF)
        if lowered < self.value:
            self.value, self.finite = lowered, 0

    def state_dict(self) -> dict[str, float]:
        """Return what later scales depend on."""
        return {"value": self.value, "finite": self.finite}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.value, self.finite = state["value"], state["finite"]


def _single(value: float) -> float:
    """Round to float32, in which workers multiply; infinity beyond it."""
    return ctypes.c_float(value).value
