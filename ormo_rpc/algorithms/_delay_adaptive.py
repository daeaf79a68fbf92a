"""Learning rates that fall with the delay of a gradient, shared by the algorithms that use them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ormo_rpc.algorithms.base import PushContext
from ormo_rpc.options import Section, option


class DelayRule(Enum):
    """How the learning rate follows the delay ``tau``; ``R`` is the threshold, by default ``2 K``."""

    ormo = "ormo"
    """``eta`` up to R, then ``eta R / tau``, or ``min(eta, 1 / (4 L tau))`` where L is given (arXiv 2407.19234)."""
    mishchenko = "mishchenko"
    """``eta K / max(K, tau)`` (Mishchenko et al. 2022, arXiv 2206.07638)."""
    koloskova = "koloskova"
    """``eta`` up to R, then ``eta / tau`` (Koloskova et al. 2022, arXiv 2206.08307)."""
    drop = "drop"
    """``eta`` up to R; a gradient that is older is discarded and its ticket done again."""


@dataclass(frozen=True, kw_only=True)
class DelayAdaptiveOptions(Section):
    """Options of a delay-adaptive learning rate."""

    rule: DelayRule = option(DelayRule.ormo, "how the learning rate follows the delay: ormo, mishchenko, koloskova or drop")
    threshold: int | None = option(
        None,
        "delay up to which nothing is changed, in iterations; default 2 K",
        valid=lambda v: isinstance(v, int) and v >= 0,
        expected="a whole number >= 0",
    )
    smoothness: float | None = option(
        None,
        "L, the smoothness of the loss, for min(lr, 1 / (4 L delay)) under rule=ormo",
        valid=lambda v: v > 0,
        expected="a number > 0",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is not None and self.rule is DelayRule.mishchenko:
            self._refuse("threshold")
        if self.smoothness is not None and self.rule is not DelayRule.ormo:
            self._refuse("smoothness")

    def _refuse(self, name: str) -> None:
        value, rule = getattr(self, name), f"{self.key('rule')}={self.rule.value}"
        raise ValueError(f"{self.key(name)}: got {value!r}, expected none, as {rule} does not use it")


def threshold(options: DelayAdaptiveOptions, context: PushContext) -> int:
    """The delay up to which a gradient keeps the scheduled learning rate."""
    return 2 * context.concurrency if options.threshold is None else options.threshold


def delay_adaptive_lr(options: DelayAdaptiveOptions, context: PushContext) -> float:
    """The learning rate of a gradient of delay ``tau``; see `DelayRule`."""
    delay, lr = context.delay, context.lr
    if options.rule is DelayRule.mishchenko:
        return lr * (context.concurrency / max(context.concurrency, delay))  # exactly lr up to a delay of K
    if delay <= threshold(options, context) or options.rule is DelayRule.drop:
        return lr
    if options.rule is DelayRule.koloskova:
        return lr / delay
    if options.smoothness is not None:
        return min(lr, 1 / (4 * options.smoothness * delay))
    return lr * threshold(options, context) / delay


def delay_adaptive_accepts(options: DelayAdaptiveOptions, context: PushContext) -> bool:
    """Whether a gradient is applied: always, but past the threshold of rule=drop."""
    return options.rule is not DelayRule.drop or context.delay <= threshold(options, context)
