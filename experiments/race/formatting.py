"""Figures in words, for tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

from experiments.race.contenders import CONTENDERS
from experiments.race.figures import Row
from ormo_rpc.report.table import MISSING


def label(row: Row) -> str:
    """A contender with its variant, for tables."""
    return ", ".join(filter(None, (CONTENDERS[row["contender"]].label, row["variant"])))


def shown(value: float, form: str = ".3g") -> str:
    """A number for a table; not reached, or missing. A ratio of 0 is one to a rival that never reached the target."""
    if value == 0:
        return "rival: not reached"
    return MISSING if math.isnan(value) else "not reached" if math.isinf(value) else format(value, form)


def from_to(values: Sequence[float]) -> str:
    """The range of sorted values."""
    if not values:
        return MISSING
    return f"{values[0]:.3g}" if len(values) == 1 else f"{values[0]:.3g} to {values[-1]:.3g}"
