"""Snapshots: the parameters in vectors that never change, as replies and checkpoints carry them."""

from __future__ import annotations

import torch

from ormo_rpc.algorithms.base import Algorithm


class Snapshots:
    """Makes each snapshot of the parameters when it is first asked for, and shares it until the next update.

    Args:
        algorithm: The owner of the parameters; its kernel makes the copies.
        sent_dtype: The dtype that parameters are rounded to when they are sent; None for no rounding.
    """

    def __init__(self, algorithm: Algorithm, sent_dtype: torch.dtype | None = None) -> None:
        self.algorithm = algorithm
        self.sent_dtype = sent_dtype
        self._exact: torch.Tensor | None = None
        self._sent: torch.Tensor | None = None

    def exact(self) -> torch.Tensor:
        """Return ``w`` as it stands, shape (D,): a copy, unless the algorithm replaces its parameters anyway."""
        if self._exact is None:
            algorithm = self.algorithm
            self._exact = algorithm.params if algorithm.OUT_OF_PLACE else algorithm.empty().copy_(algorithm.params)
        return self._exact

    def sent(self) -> torch.Tensor:
        """Return ``w`` as it is sent: rounded to ``sent_dtype``."""
        if self.sent_dtype is None:
            return self.exact()
        if self._sent is None:
            self._sent = self.copy(self.algorithm.params)
        return self._sent

    def copy(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return a copy of other vectors, rounded to ``sent_dtype``."""
        return self.algorithm.kernel.copy(vectors, self.sent_dtype)

    def reserve(self, count: int) -> None:
        """Allocate memory for this many snapshots at a time; called before the start.

        A large vector takes tens of milliseconds to make, for which a step would hold the lock.
        """
        algorithm = self.algorithm
        algorithm.kernel.reserve(algorithm.params, count)
        if algorithm.OUT_OF_PLACE:
            algorithm.params = algorithm.empty().copy_(algorithm.params)

    def invalidate(self) -> None:
        """Drop the snapshots of the former parameters."""
        self._exact = self._sent = None
