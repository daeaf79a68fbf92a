"""The one contract that every server rule keeps: tensors in, tensors out; no lock, clock or network.

A rule is one file: a subclass of `Algorithm` with its options as the nested class ``Options``. It is found by the name of its
file. The server calls, for every gradient that arrives and in this order, `Algorithm.accepts`, `Algorithm.learning_rate` and
`Algorithm.step`; between them nothing else touches the rule. A rule never asks which scheduler it runs under.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ormo_rpc.options import Section, option


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """What the server knows of a gradient when it arrives.

    Attributes:
        worker: Who computed it.
        ticket: The unit of work.
        iteration: ``t``, the number of gradients applied before it.
        stamp: ``i``, the index of the parameters at which it was taken.
        bucket: ``b(i)``, the bucket of that index.
        newest_bucket: The largest bucket handed out to anybody so far.
        concurrency: ``K``, the number of gradients in the making at this moment.
        lr: ``eta``, the scheduled learning rate of iteration ``t``.
    """

    worker: int
    ticket: int
    iteration: int
    stamp: int
    bucket: int
    newest_bucket: int
    concurrency: int
    lr: float

    @property
    def delay(self) -> int:
        """``tau = t - i``."""
        return self.iteration - self.stamp


class Algorithm(ABC):
    """A server rule: how a gradient that was taken at stamp ``i`` changes the parameters at iteration ``t``.

    Args:
        params: ``w``, the initial parameters, shape (D,); the rule owns and updates this very tensor.
        momentum: ``beta``, in [0, 1); a rule without momentum does not read it.
        options: The rule's own options.
    """

    NAME: ClassVar[str]
    """The rule's name everywhere: that of its file, of its yaml and in every metric."""

    @dataclass(frozen=True, kw_only=True)
    class Options(Section):
        """Options that every rule has: its name."""

        PATH = "algorithm"
        name: str = option("???", "the server's rule")

    def __init__(self, params: Tensor, *, momentum: float, options: Any) -> None:
        self.params = params
        self.momentum = momentum
        self.options = options

    def accepts(self, arrival: Arrival) -> bool:  # noqa: ARG002 - the common answer needs no look at it
        """Whether the gradient is applied at all; one that is not goes back into the queue as work to do again."""
        return True

    def learning_rate(self, arrival: Arrival) -> float:
        """The learning rate of this gradient: the scheduled one, unless the rule adapts it to the delay."""
        return arrival.lr

    @abstractmethod
    def step(self, grad: Tensor, lr: float, arrival: Arrival) -> None:
        """Apply one gradient, shape (D,), which is not modified."""

    def outgoing(self, worker: int) -> Tensor:  # noqa: ARG002 - most rules send everybody the same
        """What a worker is sent, shape (D,): ``w`` for most rules. The server copies it."""
        return self.params

    def state(self) -> Mapping[str, Tensor | int | float]:
        """Everything but ``w`` that the recursion carries from one gradient to the next, live (not a copy)."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned, in place."""
        for name, value in self.state().items():
            if isinstance(value, Tensor):
                value.copy_(state[name])
            else:
                setattr(self, name, state[name])
