"""The comparison of two gradients of one batch that differ in rounding alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

FLOAT64, FLOAT32, TF32, SIXTEEN = 1e-6, 1e-2, 0.15, 0.5
"""The distance of two gradients, relative to the norm of one, that rounding in another order of summation explains.

Rounding to bfloat16 moves the gradient of ResNet-20 by 0.1 of its norm, and that of a deeper net further.
"""
OF_VALUES = 0.1
"""That of losses and statistics, as a part of it: no backward pass has rounded them further."""
SMALL = 0.1
"""A loss below is compared as if it were this large, since its own rounding is that of larger numbers."""


def tolerance(parameters: Iterable[torch.Tensor], autocast: torch.dtype | None) -> float:
    """Return the relative distance that is explained by rounding.

    Args:
        parameters: What passes compute with.
        autocast: What they are cast to; None for no cast.
    """
    fewest = min(
        each.itemsize for each in (autocast or torch.float64, *(each.dtype for each in parameters if each.is_floating_point()))
    )
    if fewest <= 2:
        return SIXTEEN
    if fewest == 8:
        return FLOAT64
    rounded = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    return TF32 if rounded else FLOAT32


def difference(
    what: str,
    got: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    allowed: float,
    least: float = 0.0,
) -> str | None:
    """Say how two groups of tensors differ by more than rounding; None where they do not.

    Values that are not finite are left to the server, as long as both have some; rounding to 16 bits may make them.

    Args:
        what: What they are, for the message.
        got: Tensors by name.
        expected: The others.
        allowed: The distance, relative to the norm of ``expected``.
        least: The smallest norm that it is relative to.
    """
    if got.keys() != expected.keys():
        names = sorted(got.keys() ^ expected.keys())
        return f"{what}: got {sorted(got)}, expected {sorted(expected)} (they differ in {names[0]})"
    if not got:
        return None
    one = torch.cat([each.detach().flatten().double() for each in got.values()])
    other = torch.cat([expected[name].detach().flatten().double() for name in got])
    finite = [math.isfinite(each.norm().item()) for each in (one, other)]
    if not all(finite):
        explained = finite[0] == finite[1] or allowed >= SIXTEEN
        return None if explained else f"{what}: got {_named(finite[0])} values, expected {_named(finite[1])} ones"
    norm, distance = max(other.norm().item(), least), (one - other).norm().item()
    if distance <= allowed * norm + torch.finfo(torch.float32).tiny:
        return None
    return f"{what}: got values at a distance of {distance / max(norm, 1e-300):.2g} of their norm, expected at most {allowed:g}"


def _named(finite: bool) -> str:
    return "finite" if finite else "infinite"
