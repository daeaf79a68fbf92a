"""Top-k: the values of largest magnitude, with their places."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.compression.base import Compressed, Compression, Compressor
from ormo_rpc.errors import PushRefused
from ormo_rpc.models.flat import Layout
from ormo_rpc.options import option, register
from ormo_rpc.server.validation import all_finite


@register("topk")
@dataclass(frozen=True, kw_only=True)
class TopK(Compression):
    """The values of largest magnitude travel, with error feedback.

    They are ``k = max(1, round(ratio D))``, each with its index of 4 bytes. A push that is D values in float32
    has ``8 k`` bytes then, with bf16 or fp16 ``6 k``.

    Source: Stich, Cordonnier, Jaggi, NeurIPS 2018, arXiv 1809.07599; see `Compression` on its error feedback.
    """

    ratio: float = option(
        0.01,
        "fraction of the values that travel, at least one of them",
        valid=lambda v: 0 < v <= 1,
        expected="a number in (0, 1]",
    )

    @override
    def build(self, params: Layout) -> Compressor:
        if params.size > torch.iinfo(torch.int32).max:
            raise ValueError(f"compression: got topk for {params.size} parameters, expected at most 2,147,483,647; use another")
        return TopKCompressor(params.size, max(1, round(self.ratio * params.size)))


class TopKCompressor(Compressor):
    """Keep the k largest values, in the order of their places.

    Args:
        dimension: D.
        k: The number of values that are kept.
    """

    def __init__(self, dimension: int, k: int) -> None:
        self.dimension = dimension
        self.num_values = self.num_indices = k

    @override
    def compress(self, vector: torch.Tensor, state: torch.Tensor | None) -> Compressed:
        # NaN is the largest of all to topk, so that it is not dropped.
        places = vector.abs().topk(self.num_values, sorted=False).indices.sort().values
        return Compressed(vector[places], places.to(torch.int32))

    @override
    def decompress(self, values: torch.Tensor, indices: torch.Tensor, into: torch.Tensor) -> None:
        if not all_finite(values):
            into.fill_(math.nan)
            return
        # Indices that rise are in range if the first and the last are, and none is there twice.
        first, last = int(indices[0]), int(indices[-1])
        if first < 0 or last >= self.dimension or not bool((indices[1:] > indices[:-1]).all()):
            raise PushRefused(
                f"got indices from {first} to {last}{'' if first < 0 or last >= self.dimension else ' that do not rise'}, "
                f"expected rising ones from 0 to {self.dimension - 1} at most; worker and server must have the same wire format"
            )
        into.zero_()
        into[indices.to(torch.int64)] = values.to(into.dtype)
