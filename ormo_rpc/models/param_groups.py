"""Parameter groups of a model, by the names and shapes of its parameters."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence

from ormo_rpc.algorithms.groups import Group, Groups
from ormo_rpc.models.flat import Layout

NAMES_SHOWN = 6
"""The number of parameter names in a message."""


def param_groups(
    layout: Layout,
    *,
    weight_decay: float = 0.0,
    decay_1d: bool = True,
    no_decay: Sequence[str] = (),
    lr_factors: Mapping[str, float] | None = None,
) -> Groups:
    """Return the groups of a model, neighbours of the same decay and factor as one.

    Args:
        layout: Names and shapes of the trainable parameters.
        weight_decay: ``lambda`` of those that decay.
        decay_1d: Parameters of fewer than two dimensions (biases, norms) decay too.
        no_decay: Patterns of names of parameters without decay, as in `fnmatch`.
        lr_factors: Patterns, each with a factor; a parameter gets the product of those that match.

    Raises:
        ValueError: a pattern matches no parameter.
    """
    factors = lr_factors or {}
    for key, patterns in (("train.no_decay", no_decay), ("train.lr_factors", factors)):
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in layout.shapes):
                raise ValueError(
                    f"{key}: got {pattern!r}, which matches no trainable parameter, expected a pattern of names such as "
                    f"{_some(list(layout.shapes))}"
                )
    groups: list[Group] = []
    start = 0
    for name, shape in layout.shapes.items():
        decays = (decay_1d or len(shape) > 1) and not any(fnmatch.fnmatchcase(name, pattern) for pattern in no_decay)
        group = Group(
            start=start,
            stop=start + shape.numel(),
            weight_decay=weight_decay if decays else 0.0,
            lr_factor=math.prod(factor for pattern, factor in factors.items() if fnmatch.fnmatchcase(name, pattern)),
        )
        start = group.stop
        before = groups[-1] if groups else None
        if before is not None and (before.weight_decay, before.lr_factor) == (group.weight_decay, group.lr_factor):
            groups[-1] = Group(start=before.start, stop=group.stop, weight_decay=group.weight_decay, lr_factor=group.lr_factor)
        elif group.start < group.stop:
            groups.append(group)
    return tuple(groups)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"
