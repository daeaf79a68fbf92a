"""Gradients that are collected until B of them make one step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.algorithms.base import Algorithm


@dataclass(kw_only=True)
class Collected(Algorithm):
    """Weighted gradients are added up, and every B-th one makes a step: ``w <- w - eta G / B; G <- 0; version <- version + 1``.

    When the run ends, a rest of fewer than B is applied with the weight ``eta / B`` that each would have had.

    Attributes:
        collected: G, shape (D,).
        count: Gradients in it.
    """

    @property
    @abstractmethod
    def gradients_per_step(self) -> int:
        """B, the gradients that make a step."""

    @override
    def init(self, params: torch.Tensor, momentum: float) -> None:
        super().init(params, momentum)
        self.collected = torch.zeros_like(params)
        self.count = 0

    def collect(self, grad: torch.Tensor, lr: float, weight: float = 1.0) -> None:
        """Add a gradient with a weight, and make the step with the B-th."""
        self.collected.add_(grad, alpha=weight)
        self.count += 1
        if self.count == self.gradients_per_step:
            self.flush(lr)

    @override
    def flush(self, lr: float) -> None:
        if self.count:
            self.params.sub_(self.collected, alpha=lr / self.gradients_per_step)
            self.collected.zero_()
            self.count = 0
            self.version += 1

    @override
    def state_dict(self) -> Mapping[str, torch.Tensor | int | float]:
        return {"collected": self.collected, "count": self.count, "version": self.version}
