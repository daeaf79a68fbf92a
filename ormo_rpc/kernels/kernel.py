"""The server's kernel: steps that write new parameters into a fresh vector, and copies of vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ormo_rpc.kernels.steps import Step, Steps, TorchSteps


@dataclass(kw_only=True, slots=True)
class Kernel:
    """Implementation of the server's passes over its vectors; every one gives the same bits.

    Attributes:
        name: Its name in the header of the trace.
        steps: The steps of algorithms that work out of place.
        empty: Returns an uninitialised vector like another one, which nothing else shares.
        rounds: Each step also writes the new parameters rounded to bfloat16, for `copy`: one pass over memory less where
            workers are sent those.
    """

    name: str = "torch"
    steps: Steps = field(default_factory=TorchSteps)
    empty: Callable[[torch.Tensor], torch.Tensor] = field(default_factory=lambda: torch.empty_like)
    rounds: bool = False
    _newest: tuple[torch.Tensor, torch.Tensor] | None = field(default=None, init=False)
    """The parameters made by the newest step, and their rounded copy."""

    def apply(self, step: Step, grad: torch.Tensor, w: torch.Tensor, u: torch.Tensor | None = None) -> torch.Tensor:
        """Take a step from ``w``, which stays as it is; ``u`` is updated in place. See `Steps`.

        Args:
            step: The recursion and its numbers.
            grad: The gradient, shape (D,), of the dtype of ``w``, bfloat16 or float16.
            w: The parameters, shape (D,), float32 or float64.
            u: The momentum, shape (D,), of the dtype of ``w``; none for a step without.

        Returns:
            The new parameters, shape (D,), in a vector of their own that nobody may write to.
        """
        out, out_16bit = self.new(w)
        self.steps(step, grad, u, w, out, out_16bit)
        return out

    def new(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return memory for the next parameters and, where each step rounds, for their copy; both are to be written at once."""
        out = self.empty(w)
        out_16bit = self.empty(_like(w, torch.bfloat16)) if self.rounds else None
        self._newest = None if out_16bit is None else (out, out_16bit)
        return out, out_16bit

    def reserve(self, w: torch.Tensor, snapshots: int) -> None:
        """Allocate memory for vectors like ``w`` now, so that no step has to.

        Args:
            w: The parameters.
            snapshots: The largest number of them in use at a time.
        """
        likes = [(w, 2 if self.rounds else snapshots + 1)]  # one more, to write into
        if self.rounds:
            likes.append((_like(w, torch.bfloat16), snapshots + 1))
        made = [self.empty(like) for like, count in likes for _ in range(count)]
        del made  # so that they can be lent

    def copy(self, vectors: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a copy that never changes; a rounded one of the newest parameters exists already where steps round.

        Args:
            vectors: One or more vectors of D.
            dtype: The dtype of the copy; by default that of ``vectors``.
        """
        if dtype is None or dtype == vectors.dtype:
            return self.empty(vectors).copy_(vectors)
        if self._newest is not None and self._newest[0] is vectors and self._newest[1].dtype == dtype:
            return self._newest[1]
        return self.empty(_like(vectors, dtype)).copy_(vectors)


def _like(vectors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a stand-in of another dtype and the same length, without memory for its values, to pass to `Kernel.empty`."""
    return torch.empty(1, dtype=dtype, device=vectors.device).expand(vectors.numel())
