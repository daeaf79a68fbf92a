"""Reference implementations of algorithms that discard, collect, average or take local steps.

The legend is that of `tests.support.reference`. A gradient's *round* is ``t // B``: every B-th applied gradient ends one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ormo_rpc.algorithms.orlomo import Combine
from tests.support.reference import Gradient, Reference, Values, kept_at
from tests.support.schedule import Step


def ended(history: Sequence[Step]) -> bool:
    """Tell if a worker was told to stop: the buffers are empty then."""
    return any(reply.ticket is None for step in history for reply in step.replies)


class Collecting(Reference):
    """Every B gradients ``w <- w - eta sum / B`` at the last one's ``eta``; at the end the rest too."""

    NAME: str
    """The name of the option for B."""

    @property
    def size(self) -> int:
        """Return B."""
        return self.options.get(self.NAME, 4)

    def weight(self, gradient: Gradient) -> float:
        """Return the weight of a gradient in the sum."""
        return 1.0

    def state(self, history: Sequence[Step]) -> Values:
        gradients = self.gradients(history)
        size, n = self.size, len(gradients)
        done = n if ended(history) else n - n % size
        # A round's last gradient, and the last one of all for a rest, gives the learning rate.
        rates = [self.lr(min(g.t - g.t % size + size, n) - 1) / size for g in gradients]
        weights = [self.weight(g) for g in gradients]
        w = self.start - self.total(gradients[:done], [a * b for a, b in zip(rates[:done], weights[:done], strict=True)])
        return {
            "w": w,
            "collected": self.total(gradients[done:], weights[done:]),
            "count": n - done,
            "version": -(-done // size),
        }


class Rennala(Collecting):
    """A gradient is accepted in the round of its stamp only."""

    NAME = "batch"

    def accepts_at(self, t: int, i: int, K: int) -> bool:
        return i // self.size == t // self.size


class FedBuff(Collecting):
    """A gradient weighs ``(1 + s)^-a`` when s rounds ended since its stamp."""

    NAME = "buffer"

    def weight(self, gradient: Gradient) -> float:
        rounds = gradient.t // self.size - gradient.i // self.size
        return 1 / (1 + rounds) ** self.options.get("staleness_power", 0.0)


class Ringmaster(Reference):
    """``w = w_0 - sum of eta g`` over those of delay less than R."""

    def accepts(self, tau: int, K: int) -> bool:
        chosen = self.options.get("delay_threshold")
        return tau < (2 * K if chosen is None else chosen)

    def state(self, history: Sequence[Step]) -> Values:
        gradients = self.gradients(history)
        return {"w": self.start - self.total(gradients, [g.eta for g in gradients])}


class DelayedNesterov(Reference):
    """After r rounds ``m_r = sum of beta^(r-1-j) sum_j / N``; ``w`` sums what every gradient brings."""

    def state(self, history: Sequence[Step]) -> Values:
        gradients = self.gradients(history)
        N, c, n = self.options.get("period", 4), self.options.get("activation", 0.0), len(gradients)
        w = self.start.clone()
        for g in gradients:
            last = g.t % N == N - 1
            m = self.momentum_after(gradients, (g.t + 1) // N, N)
            w = w - g.eta * ((1 - c * N + c if last else c) * self.beta * m + g.value_D / N)
        rounds, rest = divmod(n, N)
        if rest and ended(history):
            w = w - self.lr(n - 1) * (1 - c * rest) * self.beta * self.momentum_after(gradients, rounds + 1, N)
            rounds, rest = rounds + 1, 0
        collected = self.total(gradients[n - rest :], [1.0] * rest)
        return {"w": w, "m": self.momentum_after(gradients, rounds, N), "collected": collected, "count": rest}

    def momentum_after(self, gradients: Sequence[Gradient], rounds: int, N: int) -> Tensor:
        """Return the momentum after a number of rounds; an unfinished one counts."""
        taken = gradients[: rounds * N]
        return self.total(taken, [self.beta ** (rounds - 1 - g.t // N) / N for g in taken])


class PNM(Reference):
    """``m_t = (1 - beta^2) sum of beta^(t-s) g_s`` over the s of t's parity, and ``w`` the sum of the steps."""

    def state(self, history: Sequence[Step]) -> Values:
        gradients = self.gradients(history)
        b, n = self.options.get("beta2", 1.0), len(gradients)
        w = self.start.clone()
        for g in gradients:
            w = w - g.eta * ((1 + b) * self.m(gradients, g.t) - b * self.m(gradients, g.t - 1)) / ((1 + b) ** 2 + b**2) ** 0.5
        newest = {t % 2: self.m(gradients, t) for t in (n - 2, n - 1)}
        return {"w": w, "even": newest[0], "odd": newest[1]}

    def m(self, gradients: Sequence[Gradient], t: int) -> Tensor:
        """``m_t``."""
        taken = [g for g in gradients if g.t <= t and (t - g.t) % 2 == 0]
        return self.total(taken, [(1 - self.beta**2) * self.beta ** (t - g.t) for g in taken])


class SPA(Reference):
    """``z = w_0 - sum of gamma g``; ``w`` is the average of all ``z_t`` with weights ``c (1 - c)^(n-t)``, ``w_0`` the rest.

    So step s moves w by ``c (1 - c)^(s-t) gamma g`` for each gradient. Corrected, ``gamma`` is that of step s.
    """

    def state(self, history: Sequence[Step]) -> Values:
        gradients = self.gradients(history)
        n, c = len(gradients), self.options.get("averaging") or 1 - self.beta
        if self.corrected:
            moved = [sum(c * (1 - c) ** (s.t - g.t) * s.eta for s in gradients[g.t :]) for g in gradients]
            w = self.start - self.total(gradients, moved) / (1 - self.beta)
            ahead = self.total(gradients, [(1 - c) ** (n - g.t) for g in gradients]) / (1 - self.beta)
            return {"w": w, "z": w - kept_at(gradients) * ahead}
        # A gradient of iteration t is in z_(t+1) to z_n: sum of c (1 - c)^(n-s) over s = t+1..n.
        in_w = [g.eta / (1 - self.beta) * (1 - (1 - c) ** (n - g.t)) for g in gradients]
        return {
            "w": self.start - self.total(gradients, in_w),
            "z": self.start - self.total(gradients, [g.eta / (1 - self.beta) for g in gradients]),
        }


class EASGD(Reference):
    """The plain loop: the centre and the workers that hold or held a ticket; an exchange is a convex combination of the two."""

    def state(self, history: Sequence[Step]) -> Values:
        w, own = self.start.clone(), dict[int, Tensor]()
        workers = self.num_workers
        for step in history:
            workers += {"join": 1, "leave": -1}.get(step.kind, 0)
            if step.kind == "leave":
                own.pop(step.worker, None)
            if step.push is not None:
                a = self.options.get("elasticity") or 0.9 / workers
                moved = own[step.worker] - step.push.grad
                w, own[step.worker] = (1 - a) * w + a * moved, a * w + (1 - a) * moved
            own = {**{reply.worker: w for reply in step.replies if reply.ticket is not None}, **own}
        return {"w": w, **{f"own/{worker}": value for worker, value in own.items()}}

    def scale(self, history: Sequence[Step]) -> float:
        return scale_of_moves(self.start, history)


class LocalMoves(Reference):
    """An algorithm whose pushes are in units of the parameters, and whose momentum may be corrected."""

    def scale(self, history: Sequence[Step]) -> float:
        rates = [self.lr(t) or 1.0 for t, step in enumerate(history) if step.push is not None]
        # A corrected push is multiplied by the ratio of two rates.
        ratio = max(rates, default=1.0) / min(rates, default=1.0) if self.corrected else 1.0
        return scale_of_moves(self.start, history) * ratio / (1 - self.beta)


class OrLoMo(LocalMoves):
    """``u = sum of beta^(H(I-b)) m``, ``w = w_0 - sum of (p + (beta + ... + beta^(H(I-b))) m)``.

    Corrected, a push is brought from the rate of its stamp to that of its arrival, and each later round of ``m`` to the rate of
    the iteration in which it was made up for.
    """

    def state(self, history: Sequence[Step]) -> Values:
        if self.corrected:
            return self.corrected_state(self.gradients(history))
        gradients = self.gradients(history)
        u, w, steps = torch.zeros_like(self.start), self.start.clone(), self.options.get("local_steps", 4)
        index = gradients[-1].I if gradients else 0
        for g in gradients:
            m, p = (part * self.share(g) for part in g.value_D.chunk(2))
            passed = steps * (index - g.b)
            u = u + self.beta**passed * m
            w = w - p - sum(self.beta**j for j in range(1, passed + 1)) * m
        return {"w": w, "u": u, "index": index}

    def share(self, gradient: Gradient) -> float:
        """Return the weight of a push."""
        return 1 / gradient.sharers if self.options.get("combine") is Combine.mean else 1.0

    def corrected_state(self, gradients: Sequence[Gradient]) -> Values:
        """Return the state with ``momentum_correction``."""
        u, w, steps = torch.zeros_like(self.start), self.start.clone(), self.options.get("local_steps", 4)
        index = gradients[-1].I if gradients else 0
        for g in gradients:
            m, p = (part * self.share(g) / (self.lr(g.i) or 1.0) for part in g.value_D.chunk(2))
            u = u + self.beta ** (steps * (index - g.b)) * m
            drifted = 0  # steps of the rounds since, that w has made with m so far
            for at in gradients[g.t :]:
                now = steps * (at.I - g.b)
                w = w - at.eta * sum(self.beta**j for j in range(drifted + 1, now + 1)) * m
                drifted = now
            w = w - g.eta * p
        return {"w": w, "u": kept_at(gradients) * u, "index": index}


def scale_of_moves(start: Tensor, history: Sequence[Step]) -> float:
    """Return `Reference.scale` for pushes that are in units of the parameters."""
    pushes: list[Any] = [step.push for step in history if step.push is not None]
    return 1 + float(start.abs().max()) + sum(float(push.grad.abs().max()) for push in pushes)
