"""Reference implementations of the algorithms that step as AdamW does; the legend is that of `tests.support.reference`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.support.reference import Gradient, OrMoDA, Reference, Values
from tests.support.schedule import Step


def adam(
    start: Tensor, grads: Sequence[Tensor], rates: Sequence[float], *, beta1: float, beta2: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``w, m, v`` after a step for each gradient, from the moments as weighted sums of all of them before.

    ``m_n = (1 - beta1) sum of beta1^(n-k) g_k``, ``v_n = (1 - beta2) sum of beta2^(n-k) g_k^2``.
    """
    w, m, v = start, torch.zeros_like(start), torch.zeros_like(start)
    for n, eta in enumerate(rates, start=1):
        m, v = torch.zeros_like(start), torch.zeros_like(start)
        for k, g in enumerate(grads[:n], start=1):
            m = m + (1 - beta1) * beta1 ** (n - k) * g
            v = v + (1 - beta2) * beta2 ** (n - k) * g * g
        w = w - eta * (m / (1 - beta1**n)) / ((v / (1 - beta2**n)).sqrt() + eps)
    return w, m, v


class AdamW(Reference):
    """A step for each gradient, without weight decay."""

    def stepped(self, grads: Sequence[Tensor], rates: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``w, m, v`` after these steps."""
        beta2 = self.options.get("beta2", 0.999)
        return adam(self.start, grads, rates, beta1=self.beta, beta2=beta2, eps=self.options.get("eps", 1e-8))

    def state(self, history: Sequence[Step]) -> Values:
        gradients = self.gradients(history)
        w, m, v = self.stepped([g.value_D for g in gradients], [self.rate(g) for g in gradients])
        return {"w": w, "m": m, "v": v}

    def scale(self, history: Sequence[Step]) -> float:
        """A step is up to ``|m| / sqrt(v) <= 1 / sqrt(1 - beta2) = 32`` rates, and so much larger is its rounding."""
        sizes = [float(step.push.grad.abs().max()) for step in history if step.push is not None]
        return super().scale(history) + sum(sizes) + 32 * sum(self.lr(t) for t in range(len(sizes))) / (1 - self.beta)


class AdamWDA(AdamW, OrMoDA):
    """`AdamW` with a learning rate that follows the delay."""


class OrMoAdamW(AdamW):
    """Synchronous AdamW over the buckets 0 to I, on ``G_b = sum of g / K_b``: `w`. Over those up to I - E - 1: the rest.

    A gradient that comes when the newest bucket is I counts for bucket ``max(b, I - E)``. A bucket's rate and size are those of
    the first gradient that came after it was handed out.
    """

    def state(self, history: Sequence[Step]) -> Values:
        gradients = self.gradients(history)
        index = gradients[-1].I if gradients else -1
        kept = self.options.get("window", 1) + 1
        openers = [self.opener(bucket, gradients) for bucket in range(index + 1)]
        sums = [torch.zeros_like(self.start) for _ in openers]
        for gradient in gradients:
            bucket = max(gradient.b, gradient.I - kept + 1)
            sums[bucket] = sums[bucket] + gradient.value_D
        rates = [opener.eta for opener in openers]
        means = [total / opener.K for total, opener in zip(sums, openers, strict=True)]
        w, _, _ = self.stepped(means, rates)
        committed = max(0, index + 1 - kept)
        base, m, v = self.stepped(means[:committed], rates[:committed])
        values: dict[str, Tensor] = {
            "sums": torch.zeros(kept, len(self.start), dtype=torch.float64),
            "rates": torch.zeros(kept, dtype=torch.float64),
            "sizes": torch.zeros(kept, dtype=torch.float64),
        }
        for bucket in range(committed, index + 1):
            values["sums"][bucket % kept] = sums[bucket]
            values["rates"][bucket % kept] = openers[bucket].eta
            values["sizes"][bucket % kept] = openers[bucket].K
        return {"w": w, "base": base, "m": m, "v": v, "index": index, **values}

    def opener(self, bucket: int, gradients: Sequence[Gradient]) -> Gradient:
        """Return the gradient that opened a bucket."""
        return next(gradient for gradient in gradients if bucket <= gradient.I)
