"""Metrics that a worker pushes beside its gradient: a number each, or the sum and the count of a mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ormo_rpc.errors import PushRefused

PushMetrics = Mapping[str, float | tuple[float, float]]
"""By name a number, or a pair of sum and count, whose mean is their quotient."""
MAX_NAME_CHARACTERS = 60
RESERVED = "loss"
"""The name of the loss, which each push has anyway."""


def check_push_metrics(metrics: object, what: str, error: type[ValueError] = PushRefused) -> None:
    """Refuse anything but `PushMetrics` of floats with names that can be keys; numbers may be NaN or infinite.

    Raises:
        ValueError: of the class ``error``.
    """
    if not isinstance(metrics, Mapping):
        raise error(f"{what}: got a {type(metrics).__name__}, expected numbers by name")
    for name, value in metrics.items():
        _check_name(name, what, error)
        if type(value) is float:
            continue
        if type(value) is not tuple or len(value) != 2 or any(type(each) is not float for each in value):
            raise error(f"{what}: {name}: got a {type(value).__name__}, expected a float, or a pair of them (sum, count)")
        if value[1] < 0:
            raise error(f"{what}: {name}: got the count {value[1]:g}, expected a number >= 0")


def _check_name(name: object, what: str, error: type[ValueError]) -> None:
    if type(name) is not str:
        raise error(f"{what}: got a {type(name).__name__} as a name, expected a text")
    if not 0 < len(name) <= MAX_NAME_CHARACTERS or not name.isprintable() or " " in name or name == RESERVED:
        raise error(
            f"{what}: got the name {name[: MAX_NAME_CHARACTERS + 1]!r}, expected 1 to {MAX_NAME_CHARACTERS} printable "
            f"characters without blanks, and not {RESERVED}"
        )


def as_push_metrics(metrics: Mapping[str, Any]) -> dict[str, float | tuple[float, float]]:
    """Make `PushMetrics` of what a user gives: anything that `float` takes, such as a tensor of one value, or two of that.

    Raises:
        ValueError: a name or value cannot be taken.
    """
    what = "push: metrics"
    if not isinstance(metrics, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance] # a script gives anything
        raise ValueError(f"{what}: got a {type(metrics).__name__}, expected numbers by name")
    found = {name: _as_floats(value, f"{what}: {name}") for name, value in metrics.items()}
    check_push_metrics(found, what, ValueError)
    return found


def _as_floats(value: Any, what: str) -> float | tuple[float, float]:
    try:
        if isinstance(value, (tuple, list)):
            total, count = value
            return _as_float(total), _as_float(count)
        return _as_float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last one is torch's, of a tensor of many values
        raise ValueError(f"{what}: got {str(value)[:100]!r}, expected a number, or a pair (sum, count)") from None


def as_json(metrics: PushMetrics) -> dict[str, Any]:
    """Return the metrics as JSON has them; None in the place of a number that is NaN or infinite."""
    return {name: [*map(_finite, value)] if isinstance(value, tuple) else _finite(value) for name, value in metrics.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _as_float(value: Any) -> float:
    return float(value.detach() if hasattr(value, "detach") else value)
