"""The shortcuts of residual networks."""

from __future__ import annotations

from enum import Enum


class Shortcut(Enum):
    """The shortcut of a block that halves the image and doubles the channels."""

    identity = "identity"
    """Every second pixel, the new channels zero: no parameters (option A of the paper, its choice for CIFAR)."""
    projection = "projection"
    """A 1x1 convolution of stride 2 with batch norm (option B)."""
