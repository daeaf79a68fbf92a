"""A split of two tensors, as a user may write it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass
class Tensors:
    """A user's own split: two tensors."""

    PURE: ClassVar[bool] = True

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, indices: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return the rows."""
        del generator
        return self.inputs[indices], self.targets[indices]
