"""The contract of a compressor: a vector of D to the values and indices that stand for it, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from ormo_rpc.models.flat import Layout
from ormo_rpc.options import Part, option


@dataclass(frozen=True, slots=True)
class Compressed:
    """The values and indices that stand for a vector.

    Attributes:
        values: Shape (num_values,), of the vector's dtype, before rounding; it may share the vector's memory.
        indices: Shape (num_indices,), int32.
        state: For the next call of `Compressor.compress` for the same worker.
    """

    values: torch.Tensor
    indices: torch.Tensor | None = None
    state: torch.Tensor | None = None


class Compressor(ABC):
    """Compression of a vector to values and indices, and back. It is stateless: the state of each worker is passed to it.

    Attributes:
        num_values: Values of a compressed vector.
        num_indices: Indices of a compressed vector.
    """

    num_values: int
    num_indices: int = 0

    def start(self, generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor | None:  # noqa: ARG002 - most keep nothing
        """Make the state of a worker that has pushed nothing yet; random draws come from ``generator`` alone."""
        return None

    @abstractmethod
    def compress(self, vector: torch.Tensor, state: torch.Tensor | None) -> Compressed:
        """Compress a vector, shape (D,); neither the vector nor ``state`` is written to.

        NaN or infinity anywhere in the vector is NaN or infinity in the values, so that the server refuses it.
        """

    @abstractmethod
    def decompress(self, values: torch.Tensor, indices: torch.Tensor, into: torch.Tensor) -> None:
        """Write the vector into ``into``, shape (D,); values and indices may be forged.

        The bits depend on the arguments alone, not on threads or on what was called before.

        Args:
            values: Shape (num_values,), as they have travelled, of the wire's dtype. Where one is not finite, ``into`` is not.
            indices: Shape (num_indices,), int32.
            into: Of the model's dtype; its content is overwritten.

        Raises:
            PushRefused: the indices are invalid; the message has them and the expected ones.
        """


@dataclass(frozen=True, kw_only=True)
class Compression(Part, ABC):
    """The form of a push on the wire, and its options.

    With error feedback a worker adds what the wire has dropped so far to its next push ``g``, here with ``C`` for compression
    and rounding together: ``p = g + e``, push ``C(p)``, ``e <- p - C(p)``. So nothing is lost, only late: the sum of all that
    was pushed and of the last ``e`` is the sum of all gradients. (Only the part of ``e`` in a discarded push is lost.)
    That costs a vector of D for each vector in a push on every worker; a simulation holds those of all its workers.

    It can serve rounding alone as well: nearly nothing is dropped at a time then, but what is too small for the dtype is
    dropped every time, and what is too large for fp16 is cut. With ``wire.dtype=float32`` and ``none`` nothing is fed back.

    Source: Stich, Cordonnier, Jaggi, NeurIPS 2018, arXiv 1809.07599, Algorithm 1. Departures: there ``e`` holds steps, with the
        learning rate in them; here gradients (or whatever the algorithm pushes), since the server applies the learning rate.
        ``e`` is reset when its worker joins again.
    """

    PATH = "compression"
    error_feedback: bool = option(True, "add what compression and rounding have dropped to the worker's next push")

    @abstractmethod
    def build(self, params: Layout) -> Compressor:
        """Make the compressor for vectors of that layout.

        Raises:
            ValueError: it does not support vectors of that length.
        """
