"""Means of metrics by name, of which each gradient may bring a few."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, Self

MOST_NAMES = 200
"""Metrics of further names are in the trace alone, as a name for each gradient would fill the memory."""
_log = logging.getLogger(__name__)


class Means(dict[str, tuple[float, float]]):
    """Sum and count of each metric so far, by name."""

    def add(self, metrics: Mapping[str, Any]) -> Self:
        """Add the metrics of one gradient, as its event has them: numbers, which count once, and pairs (sum, count).

        One that was not finite (None) does not count.
        """
        for name, value in metrics.items():
            total, count = value if isinstance(value, (list, tuple)) else (value, 1.0)
            if total is None or count is None:
                continue
            if name not in self and len(self) >= MOST_NAMES:
                _log.debug("metric %s: not averaged, as %d others are", name, MOST_NAMES)
                continue
            former_total, former_count = self.get(name, (0.0, 0.0))
            self[name] = (former_total + total, former_count + count)
        return self

    def means(self) -> dict[str, float]:
        """The mean of each metric that was counted at all."""
        return {name: mean for name, (total, count) in self.items() if count > 0 and math.isfinite(mean := total / count)}
