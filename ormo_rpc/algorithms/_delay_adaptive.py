"""Learning rates that fall with the delay of a gradient, shared by the algorithms that use them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from typing_extensions import override

from ormo_rpc.algorithms.base import Algorithm, PushContext
from ormo_rpc.options import option


class DelayRule(Enum):
    """The learning rate as a function of the delay ``tau``; ``R`` is the threshold."""

    ormo = "ormo"
    """``eta`` up to R (2 K by default), then ``eta R / tau``, or ``min(eta, 1 / (4 L tau))`` given L (arXiv 2407.19234)."""
    mishchenko = "mishchenko"
    """``eta K / max(K, tau)`` (Mishchenko et al. 2022, arXiv 2206.07638)."""
    koloskova = "koloskova"
    """``eta`` up to R (K by default, as published), then ``eta / tau`` (Koloskova et al. 2022, arXiv 2206.08307)."""
    drop = "drop"
    """``eta`` up to R (K by default); a gradient that is older is discarded and its ticket done again."""


@dataclass(kw_only=True)
class DelayAdaptive(Algorithm):
    """A learning rate that follows the delay, to be mixed in before an algorithm: ``class OrMoDA(DelayAdaptive, OrMo)``."""

    rule: DelayRule = option(DelayRule.ormo, "how the learning rate follows the delay: ormo, mishchenko, koloskova or drop")
    threshold: int | None = option(
        None,
        "R, delay up to which nothing is changed, in iterations; default 2 K for ormo, K (gradients in flight) for others",
        valid=lambda v: isinstance(v, int) and v >= 0,
        expected="a whole number >= 0, and >= 1 for rule=ormo",
    )
    smoothness: float | None = option(
        None,
        "L, the smoothness of the loss, for min(lr, 1 / (4 L delay)) under rule=ormo",
        valid=lambda v: v > 0,
        expected="a number > 0",
    )

    @override
    def accepts(self, context: PushContext) -> bool:
        return self.rule is not DelayRule.drop or context.delay <= self._largest_delay(context)

    @override
    def learning_rate(self, context: PushContext) -> float:
        delay, lr = context.delay, context.lr
        if self.rule is DelayRule.mishchenko:
            return lr * (context.concurrency / max(context.concurrency, delay))  # exactly lr up to a delay of K
        threshold = self._largest_delay(context)
        if delay <= threshold or self.rule is DelayRule.drop:
            return lr
        if self.rule is DelayRule.koloskova:
            return lr / delay
        if self.smoothness is not None:
            return min(lr, 1 / (4 * self.smoothness * delay))
        return lr * threshold / delay

    def _largest_delay(self, context: PushContext) -> int:
        """Return the delay up to which a gradient keeps the scheduled learning rate."""
        if self.threshold is not None:
            return self.threshold
        return 2 * context.concurrency if self.rule is DelayRule.ormo else context.concurrency

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is not None and self.rule is DelayRule.mishchenko:
            self._refuse("threshold")
        if self.threshold == 0 and self.rule is DelayRule.ormo and self.smoothness is None:
            raise ValueError(
                f"{self.key('threshold')}: got 0, expected at least 1 with {self.key('rule')}=ormo, which multiplies the "
                "learning rate of a late gradient by it"
            )
        if self.smoothness is not None and self.rule is not DelayRule.ormo:
            self._refuse("smoothness")

    def _refuse(self, name: str) -> None:
        value, rule = getattr(self, name), f"{self.key('rule')}={self.rule.value}"
        raise ValueError(f"{self.key(name)}: got {value!r}, expected none, as {rule} does not use it")
