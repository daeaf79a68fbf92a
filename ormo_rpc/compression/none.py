"""No compression: every value travels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.compression.base import Compressed, Compression, Compressor
from ormo_rpc.models.flat import Layout
from ormo_rpc.options import option, register


@register("none")
@dataclass(frozen=True, kw_only=True)
class NoCompression(Compression):
    """Every value of a push travels, rounded to ``wire.dtype``.

    Its errors are not fed back unless that is asked for: rounding to nearest drops little, and as much up as down, while the
    feedback takes several passes over vectors of D.
    """

    error_feedback: bool = option(False, "add what rounding has dropped to the worker's next push")

    @override
    def build(self, params: Layout) -> Compressor:
        return IdentityCompressor(params.size)


class IdentityCompressor(Compressor):
    """Keep all values as they are.

    Args:
        dimension: D.
    """

    def __init__(self, dimension: int) -> None:
        self.num_values = dimension

    @override
    def compress(self, vector: torch.Tensor, state: torch.Tensor | None) -> Compressed:
        return Compressed(vector)

    @override
    def decompress(self, values: torch.Tensor, indices: torch.Tensor, into: torch.Tensor) -> None:
        into.copy_(values)
