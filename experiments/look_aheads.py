"""Look-aheads of ordered momentum that were tried beside that of ``ormo_la``; `experiments.look_ahead` compares them."""

from __future__ import annotations

import dataclasses
import functools
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.algorithms import Algorithm
from ormo_rpc.algorithms.base import PullContext, PushContext
from ormo_rpc.algorithms.ormo_la import OrMoLA
from ormo_rpc.options import option


@dataclass(kw_only=True)
class Ahead(OrMoLA):
    """``w - c u``, with ``c`` of the worker's own."""

    @abstractmethod
    def ahead_of(self, worker: int) -> float:
        """Return ``c``."""

    @override
    def outgoing(self, context: PullContext) -> torch.Tensor:
        return self.params.sub(self.u, alpha=self.ahead_of(context.worker))

    def mean_late(self, worker: int) -> float:
        """Return ``n``, the mean number of buckets by which a worker's gradients have been late."""
        return self.late[worker] / self.applied[worker] if worker in self.applied else 0.0

    def geometric(self, late: float) -> float:
        """Return ``beta + ... + beta^(late+1)``."""
        return self.momentum * (1 - self.momentum ** (late + 1)) / (1 - self.momentum)


@dataclass(kw_only=True)
class Constant(Ahead):
    """``w - c u`` for everybody, whatever the delays."""

    ahead: float = option(1.0, "c")

    @override
    def ahead_of(self, worker: int) -> float:
        return self.ahead


@dataclass(kw_only=True)
class Nesterov(Ahead):
    """``w - beta u``, as if nobody were ever late."""

    @override
    def ahead_of(self, worker: int) -> float:
        return self.momentum


@dataclass(kw_only=True)
class Steady(Ahead):
    """``w - (beta + n) u``: gradients in flight keep ``u``, and so the speed of ``w``, at what it is."""

    @override
    def ahead_of(self, worker: int) -> float:
        return self.momentum + self.mean_late(worker)


@dataclass(kw_only=True)
class Shared(Ahead):
    """The look-ahead of ``ormo_la`` with the mean delay of all workers for each."""

    @override
    def ahead_of(self, worker: int) -> float:
        applied = sum(self.applied.values())
        return self.geometric(sum(self.late.values()) / applied if applied else 0.0)


@dataclass(kw_only=True)
class Sequential(Ahead):
    """The point of Nesterov momentum without delays, ``n`` buckets from now, with gradients in flight as they are on average.

    ``c = a - (a - beta - n) / rho`` with ``a = beta / (1 - beta)`` and ``rho`` the mean of ``beta^e`` over all gradients, which
    ``u`` lacks of what it would be without delays.
    """

    @override
    def init(self, params: torch.Tensor, momentum: float) -> None:
        super().init(params, momentum)
        self.weight, self.count = 0.0, 0

    @override
    def advance(self, grad: torch.Tensor, lr: float, scale: float, context: PushContext) -> None:
        super().advance(grad, lr, scale, context)
        self.weight += self.momentum ** (self.index - context.bucket)
        self.count += 1

    @override
    def ahead_of(self, worker: int) -> float:
        rest = self.momentum / (1 - self.momentum)
        rho = self.weight / self.count if self.count else 1.0
        return rest - (rest - self.momentum - self.mean_late(worker)) / rho


@dataclass(kw_only=True)
class Moved(Ahead):
    """The look-ahead of ``ormo_la``, and a gradient enters the bucket for which it was meant, ``n`` (rounded) after its own."""

    @override
    def advance(self, grad: torch.Tensor, lr: float, scale: float, context: PushContext) -> None:
        worker, index = context.worker, max(self.index, context.newest_bucket)
        meant = min(context.bucket + round(self.mean_late(worker)), index)
        super().advance(grad, lr, scale, dataclasses.replace(context, bucket=meant))
        self.late[worker] += meant - context.bucket

    @override
    def ahead_of(self, worker: int) -> float:
        return self.geometric(self.mean_late(worker))


TRIED: Mapping[str, Callable[[], Algorithm]] = {
    "ormo_la": OrMoLA,
    "Nesterov's alone": Nesterov,
    "mean delay of all": Shared,
    "steady momentum": Steady,
    "sequential Nesterov": Sequential,
    "place moved": Moved,
    **{f"c = {c:g}": functools.partial(Constant, ahead=c) for c in (0.5, 1.4, 2.0, 3.0)},
}
"""By name, makes each of them."""
