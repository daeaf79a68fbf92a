"""Momentum under a learning rate that changes, with one option for all algorithms that have a momentum.

``torch.optim.SGD`` sums gradients and multiplies the sum by the present rate, so that a new rate holds for the whole momentum
at once. An algorithm of that kind derives from `GradientMomentum`. Where the momentum sums ``eta g``, each gradient keeps the
rate of its time; such an algorithm derives from `StepMomentum`. ``momentum_correction=true`` makes all alike.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.algorithms.base import Algorithm, PushContext
from ormo_rpc.options import option


@dataclass(kw_only=True)
class Momentum(Algorithm):
    """An algorithm with a momentum."""

    momentum_correction: bool | None = option(
        None, "true: a new learning rate holds for the momentum at once, as in torch.optim.SGD; default: the authors' form"
    )


@dataclass(kw_only=True)
class GradientMomentum(Momentum):
    """A momentum that sums ``g``, and that the present learning rate multiplies: there is nothing to correct.

    Raises:
        ValueError: ``momentum_correction`` is false.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.momentum_correction is False:
            raise ValueError(
                f"{self.key('momentum_correction')}: got False, expected true or null: the momentum of {self.name} sums "
                f"gradients, and the present learning rate multiplies it"
            )


@dataclass(kw_only=True)
class StepMomentum(Momentum):
    """A momentum ``u`` that sums ``eta g``, in units of the parameters.

    With ``momentum_correction`` a change of the scheduled learning rate rescales it before it is used,
    ``u <- u eta_new / eta_old``. At a rate of 0 the parameters stay, and ``u``, which is kept at the newest rate above 0 (at 1
    before there was one), takes the gradient at that rate. Otherwise ``u`` keeps the rates of its gradients.

    Attributes:
        momentum_lr: The scheduled learning rate at which a corrected ``u`` is kept.
    """

    @override
    def init(self, params: torch.Tensor, momentum: float) -> None:
        super().init(params, momentum)
        self.momentum_lr = 1.0

    @abstractmethod
    def advance(self, grad: torch.Tensor, lr: float, scale: float, context: PushContext) -> None:
        """Multiply the momentum by ``scale``, and apply one gradient; see `Algorithm.step`."""

    @override
    def step(self, grad: torch.Tensor, lr: float, context: PushContext) -> None:
        if not self.momentum_correction:
            self.advance(grad, lr, 1.0, context)
            return
        former = self.rate_of_momentum(context.worker)
        if context.lr > 0:
            self.set_rate_of_momentum(context.worker, context.lr)
            self.advance(grad, lr, context.lr / former, context)
            return
        params = self.kernel.copy(self.params)
        at_former = dataclasses.replace(context, lr=former)
        self.advance(grad, self.learning_rate(at_former), 1.0, at_former)
        self.return_to(params)

    def rate_of_momentum(self, worker: int) -> float:  # noqa: ARG002 - most algorithms have one momentum for all
        """Return the rate at which the momentum that a worker's gradient enters is kept."""
        return self.momentum_lr

    def set_rate_of_momentum(self, worker: int, lr: float) -> None:  # noqa: ARG002 - as above
        """Set that rate."""
        self.momentum_lr = lr

    def return_to(self, params: torch.Tensor) -> None:
        """Take back a move of the parameters, but not the change of the momentum; ``params`` becomes the algorithm's own."""
        self.params = params

    @override
    def state_dict(self) -> Mapping[str, torch.Tensor | int | float]:
        return {"momentum_lr": self.momentum_lr}
