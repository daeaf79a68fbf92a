"""The comparison of two gradients of one batch that differ in rounding alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch

FLOAT64, FLOAT32, TF32, SIXTEEN = 1e-6, 5e-3, 5e-2, 0.2
"""The distance of two gradients, relative to the norm of one, that rounding in another order of summation explains.

Another branch of a model, or another dropout mask, makes more than that; a rounding that flips ReLUs, less.
"""


def tolerance(dtype: torch.dtype, *dtypes: torch.dtype | None) -> float:
    """Return the relative distance that is explained by rounding.

    Args:
        dtype: Of the vector.
        dtypes: What passes compute in, where that is another dtype.
    """
    if any(each is not None and each.itemsize == 2 for each in dtypes):
        return SIXTEEN
    if dtype is torch.float64:
        return FLOAT64
    rounded = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    return TF32 if rounded else FLOAT32


def difference(what: str, got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], allowed: float) -> str | None:
    """Say how two groups of tensors differ by more than rounding; None where they do not.

    Values that are not finite are left to the server, as long as both have some.

    Args:
        what: What they are, for the message.
        got: Tensors by name.
        expected: The others.
        allowed: The distance, relative to the norm of ``expected``.
    """
    if got.keys() != expected.keys():
        names = sorted(got.keys() ^ expected.keys())
        return f"{what}: got {sorted(got)}, expected {sorted(expected)} (they differ in {names[0]})"
    if not got:
        return None
    one = torch.cat([each.detach().flatten().double() for each in got.values()])
    other = torch.cat([expected[name].detach().flatten().double() for name in got])
    norm, distance = other.norm().item(), (one - other).norm().item()
    if not norm < float("inf"):
        return None if not one.norm().item() < float("inf") else f"{what}: got finite values, expected some that are not"
    if distance <= allowed * norm + torch.finfo(torch.float32).tiny:
        return None
    return f"{what}: got values at a distance of {distance / max(norm, 1e-300):.2g} of their norm, expected at most {allowed:g}"
