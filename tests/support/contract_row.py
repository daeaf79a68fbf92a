"""A row of the table of algorithms, and what several rows share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ormo_rpc.algorithms._delay_adaptive import DelayRule
from tests.support.reference import Reference

SCHEDULERS = ("async", "sync", "partial", "ssp")
"""Every registered scheduler; `test_every_algorithm_and_scheduler_has_its_row` compares."""


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """Settings with which an algorithm equals another one.

    Attributes:
        to: The other algorithm's name.
        options: The options of this algorithm.
        momentum: beta for both; None for any.
        num_workers: K; None for any, and then workers come and go too.
        schedulers: The schedulers under which this holds.
        exact: To the bit; otherwise to rounding.
    """

    to: str
    options: Mapping[str, Any] | None = None
    momentum: float | None = None
    num_workers: int | None = None
    schedulers: tuple[str, ...] = SCHEDULERS
    exact: bool = True


@dataclass(frozen=True, kw_only=True)
class Row:
    """The properties of an algorithm that the tests need.

    Attributes:
        name: The algorithm's name.
        reference: Its reference implementation.
        vectors: The number of vectors of D elements that it holds for ``num_workers`` workers, the parameters among them.
        more_vectors: The number of further vectors with given options.
        lr: A learning rate at which it converges on the quadratic of the convergence test, whose largest curvature is 1.
        remaining: The share of the distance to the minimum that may be left after that test: more for an algorithm that stays
            at a distance from it at a constant learning rate, such as one whose steps have nearly the size of that rate.
        variants: Its options; every test draws one.
        schedulers: The schedulers that it runs under.
        reductions: Settings with which it equals another algorithm.
        torch_sgd: The options with which its ``w`` is that of ``torch.optim.SGD`` on the same gradients, with one worker and
            under any schedule of learning rates; None where no options do that.
        nesterov: That of this optimizer.
    """

    name: str
    reference: type[Reference]
    vectors: Callable[[int], int]
    lr: float
    remaining: float = 1e-7
    variants: tuple[Mapping[str, Any], ...] = ({},)
    schedulers: tuple[str, ...] = SCHEDULERS
    reductions: tuple[Reduction, ...] = ()
    more_vectors: Callable[[Mapping[str, Any]], int] = lambda _: 0
    torch_sgd: Mapping[str, Any] | None = None
    nesterov: bool = False


CORRECTED = {"momentum_correction": True}
DELAY_ADAPTIVE: tuple[Mapping[str, Any], ...] = (
    {},
    {"threshold": 1},
    {"threshold": 2, "smoothness": 2.0},
    {"rule": DelayRule.mishchenko},
    {"rule": DelayRule.koloskova},
    {"rule": DelayRule.koloskova, "threshold": 2},
    {"rule": DelayRule.drop},
    {"rule": DelayRule.drop, "threshold": 1},
)
