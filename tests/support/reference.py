"""Reference implementations: the state of an algorithm as sums over the list of all gradients, without a running buffer.

Nothing here is shared with the package: buckets, delays, concurrency and learning rates are derived from the history of calls.
 Legend: ``D`` parameters, ``w`` parameters, ``u`` momentum, ``t`` iteration, ``i`` stamp, ``b`` bucket, ``I`` momentum
index, ``K`` concurrency, ``eta`` learning rate, ``beta`` momentum coefficient, ``tau = t - i`` delay.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tests.support.schedule import Step

Values = dict[str, Tensor | int | float]
"""``w`` and the rest of the state, by the names of the specification."""


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """A gradient that was applied.

    Attributes:
        value_D: The gradient.
        worker: Its sender.
        t: The number of gradients applied before it.
        i: Its stamp.
        b: The bucket of its stamp.
        handed: The largest stamp that was handed out before it arrived; `I` is its bucket.
        I: The largest bucket that had been handed out when it arrived: the momentum index after it.
        K: The number of workers when it arrived.
        sharers: That when its ticket was handed out.
        eta: The learning rate of the schedule.
    """

    value_D: Tensor  # noqa: N815 - the suffix is the shape
    worker: int
    t: int
    i: int
    b: int = -1
    handed: int
    I: int = -1  # noqa: E741 - the paper's name
    K: int
    sharers: int
    eta: float

    @property
    def tau(self) -> int:
        """Return the delay."""
        return self.t - self.i


def buckets(sizes: Sequence[int]) -> list[int]:
    """Return the bucket of each of the indices 0 to n.

    Args:
        sizes: K at the moment when each of the indices 1 to n came to be: a bucket that index i opens takes ``sizes[i - 1]``
            indices.
    """
    found = [0]
    while len(found) <= len(sizes):
        found += [found[-1] + 1] * sizes[len(found) - 1]
    return found[: len(sizes) + 1]


def heavy_ball(start: Tensor, sums: Sequence[Tensor], beta: float) -> tuple[Tensor, Tensor]:
    """``v <- beta v + sum; x <- x - v`` over the sums of ``eta g`` of consecutive rounds or buckets; returns ``x, v``."""
    x, v = start, torch.zeros_like(start)
    for total in sums:
        v = beta * v + total
        x = x - v
    return x, v


class Reference(ABC):
    """An algorithm as the specification defines it.

    Args:
        start: ``w_0``, shape (D,).
        num_workers: The workers at the start.
        lr: The learning rate as a function of t.
        momentum: beta.
        shapes: The shapes of the tensors in a vector of D.
        options: The options of the algorithm, by name.
    """

    def __init__(
        self,
        start: Tensor,
        *,
        num_workers: int,
        lr: Callable[[int], float],
        momentum: float,
        shapes: Sequence[tuple[int, ...]] = (),
        **options: Any,
    ) -> None:
        self.start = start.clone()
        self.shapes = shapes
        self.num_workers = num_workers
        self.lr = lr
        self.beta = momentum
        self.options = options

    @abstractmethod
    def state(self, history: Sequence[Step]) -> Values:
        """Return the state after these calls."""

    def accepts(self, tau: int, K: int) -> bool:
        """Tell if a gradient is applied."""
        return True

    def accepts_at(self, t: int, i: int, K: int) -> bool:
        """Tell if a gradient is applied, for an algorithm that reads more than the delay."""
        return self.accepts(t - i, K)

    def rate(self, gradient: Gradient) -> float:
        """Return the learning rate of a gradient."""
        return gradient.eta

    @property
    def corrected(self) -> bool:
        """Tell if the momentum follows the learning rate: with ``momentum_correction`` it is a sum of ``g``, times a rate."""
        return bool(self.options.get("momentum_correction"))

    def weight_at_rate_1(self, gradient: Gradient) -> float:
        """Return the weight of a gradient in that sum: what it would have at a scheduled rate of 1."""
        return self.rate(replace(gradient, eta=1.0))

    def gradients(self, history: Sequence[Step]) -> list[Gradient]:
        """Return the gradients that were applied, with their place in the order of iterations."""
        found: list[Gradient] = []
        handed, workers, sharers = 0, self.num_workers, dict[int, int]()
        for step in history:
            workers += {"join": 1, "leave": -1}.get(step.kind, 0)
            push = step.push
            if push is not None and self.accepts_at(len(found), push.stamp, workers):
                t = len(found)
                found.append(
                    Gradient(
                        value_D=push.grad,
                        worker=push.worker,
                        t=t,
                        i=push.stamp,
                        handed=handed,
                        K=workers,
                        sharers=sharers[push.worker],
                        eta=self.lr(t),
                    )
                )
            sharers |= dict.fromkeys((reply.worker for reply in step.replies), workers)
            handed = max([handed, *(reply.stamp for reply in step.replies if reply.ticket is not None)])
        bucket = buckets([gradient.K for gradient in found])
        return [replace(gradient, b=bucket[gradient.i], I=bucket[gradient.handed]) for gradient in found]

    def total(self, gradients: Sequence[Gradient], weights: Sequence[float]) -> Tensor:
        """Return the weighted sum of gradients, shape (D,)."""
        result = torch.zeros_like(self.start)
        for gradient, weight in zip(gradients, weights, strict=True):
            result = result + weight * gradient.value_D
        return result

    def geometric(self, terms: float) -> float:
        """``1 + beta + ... + beta^(terms - 1) = (1 - beta^terms) / (1 - beta)``."""
        return (1 - self.beta**terms) / (1 - self.beta)

    def scale(self, history: Sequence[Step]) -> float:
        """Bound the numbers that are rounded: the largest start, and the sum of all ``eta |g| / (1 - beta)``.

        The momentum of a corrected algorithm is at the rate 1 where the schedule begins with 0.
        """
        largest = sum(max(self.lr(t), self.corrected) * float(p.grad.abs().max()) for t, p in enumerate(_pushes(history)))
        return 1 + float(self.start.abs().max()) + largest / (1 - self.beta)


def _pushes(history: Sequence[Step]) -> list[Any]:
    return [step.push for step in history if step.push is not None]


def kept_at(gradients: Sequence[Gradient]) -> float:
    """Return the rate that multiplies a corrected momentum in the state: the newest one above 0, and 1 where there is none."""
    return next((g.eta for g in reversed(gradients) if g.eta > 0), 1.0)


class ASGD(Reference):
    """``w = w_0 - sum of eta g``."""

    def state(self, history: Sequence[Step]) -> Values:
        gradients = self.gradients(history)
        return {"w": self.start - self.total(gradients, [self.rate(g) for g in gradients])}


class Naive(Reference):
    """After n gradients: ``u = sum of beta^(n-1-t) eta g``, ``w = w_0 - sum of (1 - beta^(n-t)) / (1 - beta) eta g``.

    Corrected: ``u = eta_n sum of beta^(n-1-t) g``, ``w = w_0 - sum of (sum over s >= t of beta^(s-t) eta_s) g``.
    """

    def state(self, history: Sequence[Step]) -> Values:
        gradients = self.gradients(history)
        n = len(gradients)
        if self.corrected:
            rates = [self.weight_at_rate_1(g) for g in gradients]
            u = self.total(gradients, [self.beta ** (n - 1 - g.t) * r for g, r in zip(gradients, rates, strict=True)])
            steps = [sum(self.beta ** (s.t - g.t) * s.eta for s in gradients[g.t :]) for g in gradients]
            in_w = [r * step for r, step in zip(rates, steps, strict=True)]
            return {"w": self.start - self.total(gradients, in_w), "u": kept_at(gradients) * u}
        return {
            "w": self.start - self.total(gradients, [self.geometric(n - g.t) * self.rate(g) for g in gradients]),
            "u": self.total(gradients, [self.beta ** (n - 1 - g.t) * self.rate(g) for g in gradients]),
        }


class OrMo(Reference):
    """``u = sum of beta^(I-b) eta g``, ``w = w_0 - sum of (1 - beta^(I-b+1)) / (1 - beta) eta g``.

    With ``momentum_correction`` a gradient that was applied at ``t`` has the learning rate of the present in ``u`` and that of
    each shift in what the shift took from ``w``. With ``eta_n`` the schedule's rate at iteration n, ``r eta_t`` the gradient's
    own, and shift j made at ``n(j)``:
    ``u = eta_last sum of beta^(I-b) r g`` and
    ``w = w_0 - sum of r (eta_t (1 - beta^(I_t-b+1)) / (1 - beta) + sum over j in (I_t, I] of beta^(j-b) eta_n(j)) g``.
    """

    def state(self, history: Sequence[Step]) -> Values:
        gradients = self.gradients(history)
        if not gradients:
            return {"w": self.start, "u": torch.zeros_like(self.start), "index": 0}
        last = gradients[-1]
        if self.corrected:
            rates = [self.weight_at_rate_1(g) for g in gradients]
            in_u = [self.beta ** (last.I - g.b) * r * kept_at(gradients) for g, r in zip(gradients, rates, strict=True)]
            arrived = [g.eta * self.on_arrival(g) + self.shifted(g, gradients) for g in gradients]
            in_w = [r * weight for r, weight in zip(rates, arrived, strict=True)]
        else:
            in_u = [self.beta ** (last.I - g.b) * self.rate(g) for g in gradients]
            in_w = [self.rate(g) * self.in_params(g, last.I) for g in gradients]
        return {"w": self.start - self.total(gradients, in_w), "u": self.total(gradients, in_u), "index": last.I}

    def in_params(self, gradient: Gradient, index: int) -> float:
        """Return the weight of ``eta g`` in ``w_0 - w`` when the momentum index is ``index``."""
        return self.geometric(index - gradient.b + 1)

    def on_arrival(self, gradient: Gradient) -> float:
        """Return the weight with which ``eta g`` enters the parameters."""
        return self.geometric(gradient.I - gradient.b + 1)

    def shifted(self, gradient: Gradient, gradients: Sequence[Gradient]) -> float:
        """Return the weight in the parameters from later shifts, each with the learning rate of its own iteration."""
        weight = 0.0
        for before, after in zip(gradients[gradient.t :], gradients[gradient.t + 1 :], strict=False):
            for index in range(before.I + 1, after.I + 1):
                weight += self.beta ** (index - gradient.b) * after.eta
        return weight


class OrMoVanilla(OrMo):
    """OrMo whose gradient enters ``w`` with weight 1; the shifts add ``beta^j`` for j from ``I_t-b+1`` to ``I-b``.

    That sum is ``(beta^(I_t-b+1) - beta^(I-b+1)) / (1 - beta)``, with ``I_t`` the momentum index when the gradient came.
    """

    def in_params(self, gradient: Gradient, index: int) -> float:
        e = gradient.I - gradient.b
        return 1 + (self.beta ** (e + 1) - self.beta ** (index - gradient.b + 1)) / (1 - self.beta)

    def on_arrival(self, gradient: Gradient) -> float:
        return 1.0


class OrMoDA(OrMo):
    """OrMo with a learning rate that follows the delay."""

    def accepts(self, tau: int, K: int) -> bool:
        return not (self.rule == "drop" and tau > self.limit(K))

    def rate(self, gradient: Gradient) -> float:
        eta, tau, K = gradient.eta, gradient.tau, gradient.K
        if self.rule == "mishchenko":
            return eta if tau <= K else eta * K / tau
        if self.rule == "drop" or tau <= self.limit(K):
            return eta
        if self.rule == "koloskova":
            return eta / tau
        if self.options.get("smoothness") is not None:
            return min(eta, 1 / (4 * self.options["smoothness"] * tau))
        return eta * self.limit(K) / tau

    @property
    def rule(self) -> str:
        """Return the name of the delay rule."""
        return getattr(self.options.get("rule"), "value", "ormo")

    def limit(self, K: int) -> int:
        """Return the delay up to which the learning rate stays."""
        chosen = self.options.get("threshold")
        if chosen is not None:
            return chosen
        return {"ormo": 2 * K, "koloskova": K, "drop": K}[self.rule]


class OrMoLA(OrMo):
    """`OrMo`; what a worker is sent, ``w`` after ``n + 1`` more shifts, weighs each gradient like an index that much larger."""

    def state(self, history: Sequence[Step]) -> Values:
        late = self.lateness(history)
        sums = {f"late/{worker}": sum(buckets) for worker, buckets in late.items()}
        return {**super().state(history), **sums, **{f"applied/{worker}": len(buckets) for worker, buckets in late.items()}}

    def sent(self, history: Sequence[Step], worker: int) -> Tensor:
        """Return what a worker is sent that is answered after these calls, shape (D,), without ``momentum_correction``."""
        gradients, late = self.gradients(history), self.lateness(history).get(worker, [0])
        if not gradients:
            return self.start
        ahead = gradients[-1].I + (sum(late) / len(late) + 1 if self.beta > 0 else 0)
        return self.start - self.total(gradients, [self.rate(g) * self.geometric(ahead - g.b + 1) for g in gradients])

    def lateness(self, history: Sequence[Step]) -> dict[int, list[int]]:
        """Return, by worker, the buckets by which each of its gradients since it last left was late."""
        found: dict[int, list[int]] = {}
        gradients = self.gradients(history)
        for n, step in enumerate(history):
            if step.kind == "leave":
                found.pop(step.worker, None)
            elif step.push is not None and len(self.gradients(history[: n + 1])) > len(self.gradients(history[:n])):
                gradient = gradients[len(self.gradients(history[:n]))]
                found.setdefault(step.worker, []).append(gradient.I - gradient.b)
        return found


class OrMoLADA(OrMoLA, OrMoDA):
    """OrMo with look-ahead and a learning rate that follows the delay."""
