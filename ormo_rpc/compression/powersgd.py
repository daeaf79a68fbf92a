"""PowerSGD: two thin factors for each matrix of parameters."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from typing_extensions import override

from ormo_rpc.compression.base import Compressed, Compression, Compressor
from ormo_rpc.models.flat import Layout
from ormo_rpc.options import at_least_one, option, positive, register

DEPENDENT = 100
"""In units of the dtype's epsilon: a column of which less is left beside the columns before it is a combination of them."""


@register("powersgd")
@dataclass(frozen=True, kw_only=True)
class PowerSGD(Compression):
    """Two thin factors for each matrix of parameters travel, with error feedback.

    Each parameter's gradient as a matrix ``M``, shape (n, m), becomes ``P``, (n, r), and ``Q``, (m, r); ``M ~ P Q^T``.

    One step of power iteration, from the ``Q`` of the worker's last push (warm start) or a random one, as torch's
    `powerSGD_hook` has it: orthogonalise ``Q``; ``P = M Q``; orthogonalise ``P``; ``Q = M^T P``. ``M`` is the gradient viewed
    as (shape[0], -1), and r the rank, at most n and m. A tensor for which ``min_compression_rate (n + m) rank < n m`` does not
    hold, such as a bias, travels as it is. Use it with error feedback: alone it is biased.

    Source: Vogels, Karimireddy, Jaggi, NeurIPS 2019, arXiv 1905.13727, Algorithms 1 and 2. Departures: there is no all-reduce,
        since each worker's push stands alone, so the factors are those of one worker's gradient, not of the mean, ``Q`` is
        each worker's own, and both factors travel. A column that depends on those before it travels as 0 and keeps its former
        ``Q`` for the next push, where torch divides by (nearly) 0; so a gradient of 0 does no harm.
    """

    rank: int = option(2, "r, columns of each factor", valid=at_least_one, expected="a whole number >= 1")
    min_compression_rate: float = option(
        2.0,
        "tensors that would not become smaller by more than this factor travel as they are",
        valid=positive,
        expected="a finite number > 0",
    )

    @override
    def build(self, params: Layout) -> Compressor:
        return PowerSGDCompressor(params, self.rank, self.min_compression_rate)


@dataclass(frozen=True, slots=True)
class FactoredTensor:
    """One tensor: its place in the vector, and the offsets of its values and of its part of the state.

    Attributes:
        place: In the vector.
        rows: n.
        columns: m.
        rank: r; 0 for a tensor that travels as it is.
        values: Offset of its values: the tensor's own, or ``P`` and then ``Q``, row by row.
        state: Offset of ``Q`` in the state.
    """

    place: slice
    rows: int
    columns: int
    rank: int
    values: int
    state: int

    @property
    def num_values(self) -> int:
        """The number of values that stand for it."""
        return (self.rows + self.columns) * self.rank if self.rank else self.rows * self.columns

    def factors(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``P``, shape (n, r), and ``Q``, shape (m, r), as views."""
        middle = self.values + self.rows * self.rank
        end = middle + self.columns * self.rank
        return values[self.values : middle].view(self.rows, self.rank), values[middle:end].view(self.columns, self.rank)

    def previous(self, state: torch.Tensor) -> torch.Tensor:
        """View the ``Q`` of the last push, shape (m, r)."""
        return state[self.state : self.state + self.columns * self.rank].view(self.columns, self.rank)


class PowerSGDCompressor(Compressor):
    """Compress each tensor that becomes small enough to two factors.

    Args:
        params: Names and shapes of the tensors.
        rank: r.
        least_rate: The factor by which a tensor has to become smaller, at least.
    """

    def __init__(self, params: Layout, rank: int, least_rate: float) -> None:
        self.parts: list[FactoredTensor] = []
        self.num_values = self.state_size = 0
        ends = accumulate(shape.numel() for shape in params.shapes.values())
        for shape, end in zip(params.shapes.values(), ends, strict=True):
            rows = shape[0] if shape else 1
            columns = shape.numel() // max(1, rows)
            worth = (rows + columns) * rank * least_rate < rows * columns
            taken = min(rows, columns, rank) if worth else 0
            part = FactoredTensor(slice(end - shape.numel(), end), rows, columns, taken, self.num_values, self.state_size)
            self.parts.append(part)
            self.num_values += part.num_values
            self.state_size += columns * taken

    @override
    def start(self, generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(self.state_size, generator=generator, dtype=dtype)

    @override
    def compress(self, vector: torch.Tensor, state: torch.Tensor | None) -> Compressed:
        assert state is not None, "what `start` returned"
        values, after = vector.new_empty(self.num_values), state.clone()
        for part in self.parts:
            if not part.rank:
                values[part.values : part.values + part.num_values] = vector[part.place]
                continue
            matrix = vector[part.place].view(part.rows, part.columns)
            previous = part.previous(after)
            former = previous.clone()
            orthogonalise(previous)
            p, q = part.factors(values)
            torch.mm(matrix, previous, out=p)
            orthogonalise(p)
            torch.mm(matrix.t(), p, out=q)
            torch.where(q.any(0), q, former, out=previous)
        return Compressed(values, None, after)

    @override
    def decompress(self, values: torch.Tensor, indices: torch.Tensor, into: torch.Tensor) -> None:
        for part in self.parts:
            if not part.rank:
                into[part.place] = values[part.values : part.values + part.num_values]
                continue
            matrix = into[part.place].view(part.rows, part.columns)
            p, q = (factor.to(into.dtype) for factor in part.factors(values))
            columns = q.t().contiguous()
            # A sum of outer products element by element, since the bits of a matrix product may vary.
            torch.mul(p[:, :1], columns[0], out=matrix)
            for column in range(1, part.rank):
                matrix.addcmul_(p[:, column : column + 1], columns[column])


def orthogonalise(matrix: torch.Tensor) -> None:
    """Gram-Schmidt in place on the columns; one that depends on those before it becomes 0."""
    before = torch.linalg.vector_norm(matrix, dim=0).tolist()
    least = DEPENDENT * torch.finfo(matrix.dtype).eps
    for number, norm_before in enumerate(before):
        column = matrix[:, number : number + 1]
        norm = torch.linalg.vector_norm(column)
        if norm.item() <= least * norm_before:
            column.zero_()
            continue
        column.div_(norm)
        rest = matrix[:, number + 1 :]
        rest.sub_(torch.sum(column * rest, dim=0, keepdim=True) * column)
