"""Clipping, weight decay and learning-rate factors, applied by a worker to the gradient that it pushes."""

from __future__ import annotations

import torch

from ormo_rpc.algorithms.groups import Groups

PART = 1 << 16
"""Values whose squares are added up one after the other, in float32 with an error that does not show; of millions it is 1%."""


def regularise(grad: torch.Tensor, params: torch.Tensor, *, clip_norm: float | None = None, groups: Groups = ()) -> None:
    """Clip by the global norm, decay, then multiply by the groups' learning-rate factors: torch's order. In place.

    Args:
        grad: The gradient of the loss, shape (D,).
        params: The parameters where it was taken; their first D elements are read.
        clip_norm: The largest norm; None for no clipping.
        groups: Weight decay and factor of each range; none to leave both out.
    """
    if clip_norm is not None and grad.device.type != "cpu":
        grad.mul_((clip_norm / grad.norm()).clamp(max=1.0))  # nobody waits for the device
    elif clip_norm is not None:
        norm = torch.stack([part.norm() for part in grad.split(PART)]).norm().item()
        if norm > clip_norm:
            grad.mul_(clip_norm / norm)
    for group in groups:
        part = group.of(grad)
        if group.weight_decay:
            part.add_(params[group.start : group.stop], alpha=group.weight_decay)
        if group.lr_factor != 1.0:
            part.mul_(group.lr_factor)
