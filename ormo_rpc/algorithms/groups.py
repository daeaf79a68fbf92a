"""Parameter groups: the weight decay and the learning-rate factor of each range of the flat parameters.

They are ``torch.optim``'s parameter groups. In an algorithm that is linear in the gradient a factor of the gradient is one of
the learning rate, so the worker decays and scales before it pushes (`ormo_rpc.worker.regularise`). An algorithm with
`Algorithm.DECAYS_ITSELF` has the groups on the server.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import torch

T = TypeVar("T", "torch.Tensor", "torch.Tensor | None")


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """A range of the flat parameters.

    Attributes:
        start: Its first element.
        stop: The element behind its last one.
        weight_decay: ``lambda``.
        lr_factor: Its learning rate, as a multiple of the scheduled one.
    """

    start: int
    stop: int
    weight_decay: float = 0.0
    lr_factor: float = 1.0

    def of(self, flat: T) -> T:
        """Return the group's part of a vector of D, as a view; of one that is absent, None."""
        if flat is None or (self.start == 0 and self.stop == flat.numel()):
            return flat
        return flat[self.start : self.stop]


Groups: TypeAlias = Sequence[Group]
"""Groups that together are the whole vector, in its order."""


def uniform(dimension: int, weight_decay: float = 0.0) -> Groups:
    """Return the one group of all parameters."""
    return (Group(start=0, stop=dimension, weight_decay=weight_decay),)


def check_groups(groups: Groups, dimension: int) -> None:
    """Refuse groups that are not the whole vector in its order.

    Raises:
        ValueError: there is a gap, an overlap, or a negative decay or factor.
    """
    bounds = [0, *itertools.chain.from_iterable((group.start, group.stop) for group in groups), dimension]
    if bounds[::2] != bounds[1::2] or any(group.start >= group.stop for group in groups):
        raise ValueError(f"groups: got the ranges {bounds[1:-1]}, expected 0 to {dimension} without gap or overlap")
    for group in groups:
        if not (0 <= group.weight_decay < float("inf") and 0 <= group.lr_factor < float("inf")):
            raise ValueError(f"groups: got {group}, expected finite numbers >= 0")
