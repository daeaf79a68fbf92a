"""Top-k: the values of largest magnitude, with their places."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ormo_rpc.compression.base import Compressed, Compression, Compressor
from ormo_rpc.errors import PushRefused
from ormo_rpc.models.flat import Layout
from ormo_rpc.options import option
from ormo_rpc.server.validation import all_finite


@dataclass(frozen=True, kw_only=True)
class TopK(Compression):
    """The ``k = max(1, round(ratio D))`` values of largest magnitude travel, each with its index of 4 bytes.

    A push that is D values in float32 has ``8 k`` bytes then, with bf16 or fp16 ``6 k``.

    Source: Stich, Cordonnier, Jaggi, NeurIPS 2018, arXiv 1809.07599; see `Compression` on its error feedback.
    """

    name: str = option("topk", "the values of largest magnitude travel, with their indices")
    ratio: float = option(
        0.01, "which part of the values travels, at least one", valid=lambda v: 0 < v <= 1, expected="a number in (0, 1]"
    )

    def build(self, params: Layout) -> Compressor:
        """See `Compression.build`."""
        if params.size > torch.iinfo(torch.int32).max:
            raise ValueError(f"compression: got topk for {params.size} parameters, expected at most 2,147,483,647; use another")
        return Largest(params.size, max(1, round(self.ratio * params.size)))


class Largest(Compressor):
    """The k largest values, in the order of their places.

    Args:
        dimension: D.
        k: How many.
    """

    def __init__(self, dimension: int, k: int) -> None:
        self.dimension = dimension
        self.num_values = self.num_indices = k

    def compress(self, vector: Tensor, kept: Tensor | None) -> Compressed:  # noqa: ARG002 - there is nothing to keep
        """See `Compressor.compress`; to torch NaN is the largest of all."""
        places = vector.abs().topk(self.num_values, sorted=False).indices.sort().values
        return Compressed(vector[places], places.to(torch.int32))

    def decompress(self, values: Tensor, indices: Tensor, into: Tensor) -> None:
        """See `Compressor.decompress`; indices that rise are in range if the first and last are, and none is there twice."""
        if not all_finite(values):
            into.fill_(math.nan)
            return
        first, last = int(indices[0]), int(indices[-1])
        if first < 0 or last >= self.dimension or not bool((indices[1:] > indices[:-1]).all()):
            raise PushRefused(
                f"got indices from {first} to {last}{'' if first < 0 or last >= self.dimension else ' that do not rise'}, "
                f"expected rising ones from 0 to {self.dimension - 1} at most; worker and server must have the same wire format"
            )
        into.zero_()
        into[indices.to(torch.int64)] = values.to(into.dtype)
