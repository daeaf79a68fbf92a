"""The contract of every model: options in, a network for these inputs and classes out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from ormo_rpc.options import Part


@dataclass(frozen=True, kw_only=True)
class Model(Part, ABC):
    """A network and its options."""

    PATH = "model"

    @abstractmethod
    def build(self, input_shape: tuple[int, ...], num_classes: int) -> torch.nn.Module:
        """Make the network, with its initial weights drawn from the global generators, which the caller has seeded.

        Args:
            input_shape: The shape of one sample, without the batch.
            num_classes: The width of the output: the network maps (B, *input_shape) to logits of shape (B, num_classes).

        Raises:
            ValueError: when the network does not fit these inputs.
        """


def is_probability(value: float) -> bool:
    """Tell whether a dropout rate is in [0, 1)."""
    return 0.0 <= value < 1.0


def image_shape(name: str, input_shape: tuple[int, ...], smallest: int = 1) -> tuple[int, int, int]:
    """The input shape as (channels, height, width).

    Raises:
        ValueError: when the inputs are no images, or smaller than ``smallest`` pixels in height or width.
    """
    if len(input_shape) != 3 or min(input_shape[1:]) < smallest:
        raise ValueError(
            f"model: {name} takes images (channels, height, width) of at least {smallest}x{smallest} pixels, "
            f"but the data set's inputs have shape {input_shape}"
        )
    channels, height, width = input_shape
    return channels, height, width
