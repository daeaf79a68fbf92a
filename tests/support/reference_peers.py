"""Reference implementations of the peers of ordered momentum; the legend is that of `tests.support.reference`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tests.support.reference import ASGD, Gradient, OrMoDA, Reference, Values, kept_at
from tests.support.schedule import Step


class ASGDDA(ASGD, OrMoDA):
    """``w = w_0 - sum of eta(tau) g`` over the gradients that are not dropped."""


class StalenessAware(ASGD):
    """``w = w_0 - sum of eta / max(tau, 1) g``."""

    def rate(self, gradient: Gradient) -> float:
        return gradient.eta if gradient.tau == 0 else gradient.eta / gradient.tau


class InUnitsOfTheGradient(Reference):
    """An algorithm whose momentum sums ``g``, not ``eta g``, so that rounding works on larger numbers."""

    def scale(self, history: Sequence[Step]) -> float:
        sizes = [float(step.push.grad.abs().max()) for step in history if step.push is not None]
        return super().scale(history) + sum(sizes) / (1 - self.beta)


class PerWorker(InUnitsOfTheGradient):
    """Algorithms with a buffer for each worker: a *stay* of a worker ends when it leaves, and its buffer with it."""

    def stays(self, history: Sequence[Step]) -> dict[tuple[int, int], list[Gradient]]:
        """Return the gradients of each stay, by worker and the number of times that it had left before."""
        found: dict[tuple[int, int], list[Gradient]] = {}
        left = Counter[int]()
        gradients = iter(self.gradients(history))
        for step in history:
            if step.kind == "leave":
                left[step.worker] += 1
            elif step.push is not None:
                found.setdefault((step.worker, left[step.worker]), []).append(next(gradients))
        return found

    def present(self, history: Sequence[Step]) -> Mapping[int, list[Gradient]]:
        """Return the gradients of the stays that have not ended, by worker."""
        left = Counter(step.worker for step in history if step.kind == "leave")
        return {worker: stay for (worker, number), stay in self.stays(history).items() if number == left[worker]}

    def at_present_rates(self, history: Sequence[Step]) -> Tensor:
        """``w``, to which each step brings the whole buffer of its worker times the learning rate of the step."""
        w = self.start
        for stay in self.stays(history).values():
            w = w - self.total(
                stay, [sum(self.beta**j * later.eta for j, later in enumerate(stay[n:])) for n in range(len(stay))]
            )
        return w

    def powers(self, count: int) -> list[float]:
        """``beta^(count-1), ..., beta, 1``: the weights of the gradients of a stay in its buffer."""
        return [self.beta ** (count - 1 - n) for n in range(count)]


class Shifted(PerWorker):
    """``v_k = sum of beta^m eta g``, m the later ones of k; in w a gradient weighs ``(1 - beta^(m+1)) / (1 - beta)``.

    Corrected, it is `DANA` with ``v_k`` multiplied by the newest learning rate of worker k.
    """

    def state(self, history: Sequence[Step]) -> Values:
        if self.corrected:
            buffers = {
                f"v/{worker}": kept_at(stay) * self.total(stay, self.powers(len(stay)))
                for worker, stay in self.present(history).items()
            }
            return {"w": self.at_present_rates(history), **buffers}
        w = self.start
        for stay in self.stays(history).values():
            w = w - self.total(stay, [self.geometric(len(stay) - n) * g.eta for n, g in enumerate(stay)])
        buffers = {
            f"v/{worker}": self.total(stay, [p * g.eta for p, g in zip(self.powers(len(stay)), stay, strict=True)])
            for worker, stay in self.present(history).items()
        }
        return {"w": w, **buffers}


class DANA(PerWorker):
    """`Shifted` in units of g: a gradient enters w with ``sum of beta^j eta`` over the rates of its worker since."""

    def state(self, history: Sequence[Step]) -> Values:
        buffers = {f"v/{worker}": self.total(stay, self.powers(len(stay))) for worker, stay in self.present(history).items()}
        return {"w": self.at_present_rates(history), "total": sum(buffers.values(), torch.zeros_like(self.start)), **buffers}


class SMEGA2(InUnitsOfTheGradient):
    """With m_r the mean gradient of round r: ``v = sum of beta^(rounds since) m_r``; w gets the v of each gradient's time."""

    def state(self, history: Sequence[Step]) -> Values:
        gradients = self.gradients(history)
        rounds: list[list[Gradient]] = [[]]
        for gradient in gradients:
            rounds[-1].append(gradient)
            if len(rounds[-1]) >= gradient.K:
                rounds.append([])
        if rounds[-1] and any(reply.ticket is None for step in history for reply in step.replies):  # the end of the run
            rounds.append([])
        w = self.start - self.total(gradients, [g.eta for g in gradients])
        for number, members in enumerate(rounds):
            w = w - sum(g.eta for g in members) * self.beta * self.momentum(rounds[:number])
        return {"w": w, "v": self.momentum(rounds[:-1]), "G": self.total(rounds[-1], [1.0] * len(rounds[-1]))}

    def momentum(self, rounds: Sequence[Sequence[Gradient]]) -> Tensor:
        """``v`` after these rounds."""
        v = torch.zeros_like(self.start)
        for number, members in enumerate(rounds):
            weight = self.beta ** (len(rounds) - 1 - number) / len(members)
            v = v + self.total(members, [weight] * len(members))
        return v


class DCASGD(Reference):
    """All parameters ``w_0, ..., w_n`` one after the other, ``w_bak = w_i``, and MS as a sum over all gradients so far."""

    def state(self, history: Sequence[Step]) -> Values:
        gradients = self.gradients(history)
        w, mean_squares = [self.start], [torch.zeros_like(self.start)]
        for g in gradients:
            mean_squares.append(self.mean_square(gradients[: g.t + 1]))
            w.append(w[-1] - g.eta * g.value_D - g.eta * self.curvature(g, mean_squares[-1]) * (w[g.t] - w[g.i]))
        return {"w": w[-1], **({"mean_square": mean_squares[-1]} if self.adaptive else {})}

    @property
    def adaptive(self) -> bool:
        """Tell if lambda follows the size of the gradients."""
        return self.options.get("adaptive", True)

    def mean_square(self, gradients: Sequence[Gradient]) -> Tensor:
        """``MS = sum of 0.05 * 0.95^(later gradients) g^2``."""
        squares = torch.stack([g.value_D**2 for g in gradients])
        later = torch.arange(len(gradients) - 1, -1, -1, dtype=squares.dtype)
        return (0.05 * 0.95**later) @ squares

    def curvature(self, g: Gradient, mean_square: Tensor) -> Tensor:
        """``lambda_t g^2``."""
        chosen = self.options.get("compensation")
        if self.adaptive:
            return (2.0 if chosen is None else chosen) * g.value_D**2 / torch.sqrt(mean_square + 1e-7)
        return (0.04 if chosen is None else chosen) * g.value_D**2

    def scale(self, history: Sequence[Step]) -> float:
        """Bound the numbers that are rounded: a step multiplies an error by at most ``1 + 2 eta lambda_t g^2``.

        The parameters themselves are within the same factor of those without compensation.
        """
        gradients, factor = self.gradients(history), 1.0
        for g in gradients:
            factor *= 1 + 2 * g.eta * float(self.curvature(g, self.mean_square(gradients[: g.t + 1])).max())
        return super().scale(history) * factor


class GapAware(InUnitsOfTheGradient):
    """All parameters one after the other; v and MS as sums over all divided gradients so far, ``w_bak = w_i``."""

    def state(self, history: Sequence[Step]) -> Values:
        w, v, divided = [self.start], list[Tensor](), list[Tensor]()
        for g in self.gradients(history):
            penalty = torch.ones_like(self.start)
            largest = max(self.lr(t) for t in range(g.t + 1))
            if v and largest > 0:
                bias = sum(0.001 * 0.999**n for n in range(len(v)))
                usual = (decayed(0.999, [0.001 * one**2 for one in v]) / bias) ** 0.5
                penalty = 1 + (w[g.t] - w[g.i]).abs() / (largest * (usual + 1e-8))
            divided.append(g.value_D / penalty)
            v.append(decayed(self.beta, divided))
            w.append(w[-1] - g.eta * v[-1])
        zero = torch.zeros_like(self.start)
        mean_square = decayed(0.999, [0.001 * one**2 for one in v]) if v else zero
        return {"w": w[-1], "v": v[-1] if v else zero, "mean_square": mean_square}


def decayed(keep: float, terms: Sequence[Tensor]) -> Tensor:
    """``sum of keep^(later terms) term``."""
    later = torch.arange(len(terms) - 1, -1, -1, dtype=terms[0].dtype)
    return (keep**later) @ torch.stack(list(terms))
