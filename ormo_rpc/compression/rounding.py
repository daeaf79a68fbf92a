"""Rounding to the wire's dtype."""

from __future__ import annotations

import torch

from ormo_rpc.server.validation import all_finite


def round_into(values: torch.Tensor, out: torch.Tensor) -> None:
    """Round to the nearest value of ``out``'s dtype; what is beyond its range becomes its largest finite value.

    NaN and infinity stay what they are.
    """
    out.copy_(values)
    if out.dtype == values.dtype or all_finite(out):
        return
    largest = torch.finfo(out.dtype).max
    out.copy_(torch.where(values.isfinite() & out.isinf(), values.sign() * largest, out.to(values.dtype)))
