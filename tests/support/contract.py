"""The table of algorithms: one row each, and every row inherits every test of ``test_contract.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from ormo_rpc.algorithms._delay_adaptive import DelayRule
from ormo_rpc.algorithms.orlomo import Combine
from ormo_rpc.algorithms.ringmaster_lmo import Lmo
from ormo_rpc.server.build import build_server
from ormo_rpc.server.events import Event
from ormo_rpc.server.parameter_server import ParameterServer
from tests.support import (
    reference,
    reference_adamw,
    reference_batching,
    reference_directions,
    reference_levels,
    reference_local_steps,
    reference_peers,
    reference_ringleader,
    reference_rounds,
)
from tests.support.schedule import Run, Schedule, noise, schedules

SCHEDULERS = ("async", "sync", "partial", "ssp")
"""Every registered scheduler; `test_every_algorithm_and_scheduler_has_its_row` compares."""
SCHEDULER_OPTIONS: Mapping[str, Mapping[str, Any]] = {"partial": {"k": 2}, "ssp": {"s": 1}}
"""Options with which a scheduler holds workers back although these tests have few."""
DIMENSION = 6
SHAPES = ((2, 2), (), (1,))
"""The tensors of the parameters."""
LEARNING_RATES: Mapping[str, Callable[[int], float]] = {
    "constant": lambda _: 0.1,
    "decay": lambda t: 0.1 / (1 + t),
    "step": lambda t: 0.1 if t % 4 < 2 else 0.03,
    "erratic": lambda t: (0.0, 0.1, 0.02, 0.05)[(t * t % 11 + t) % 4],
}


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
    reference: type[reference.Reference]
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
ROWS = (
    Row(name="asgd", reference=reference.ASGD, vectors=lambda _: 1, lr=0.1),
    Row(
        name="naive",
        reference=reference.Naive,
        vectors=lambda _: 2,
        lr=0.01,
        variants=({}, CORRECTED),
        reductions=(Reduction(to="asgd", momentum=0.0, exact=False), Reduction(to="ormo", num_workers=1, exact=False)),
        torch_sgd=CORRECTED,
    ),
    Row(
        name="ormo",
        reference=reference.OrMo,
        vectors=lambda _: 2,
        lr=0.01,
        variants=({}, CORRECTED),
        reductions=(Reduction(to="asgd", momentum=0.0), Reduction(to="asgd", momentum=0.0, options=CORRECTED)),
        torch_sgd=CORRECTED,
    ),
    Row(
        name="ormo_da",
        reference=reference.OrMoDA,
        vectors=lambda _: 2,
        lr=0.01,
        variants=(*DELAY_ADAPTIVE, CORRECTED, {"threshold": 1, **CORRECTED}),
        reductions=(
            Reduction(to="ormo", options={"threshold": 1000}),
            Reduction(to="ormo", options={"rule": DelayRule.drop, "threshold": 1000}),
            Reduction(to="ormo", num_workers=1),
            # Under sync the oldest gradient of a round of K has the delay K - 1, which no algorithm takes for late.
            Reduction(to="ormo", options={"rule": DelayRule.mishchenko}, num_workers=3, schedulers=("sync",)),
        ),
        torch_sgd=CORRECTED,
    ),
    Row(
        name="ormo_la",
        reference=reference.OrMoLA,
        vectors=lambda _: 2,
        lr=0.01,
        variants=({}, CORRECTED),
        reductions=(Reduction(to="asgd", momentum=0.0), Reduction(to="asgd", momentum=0.0, options=CORRECTED)),
        torch_sgd=CORRECTED,
    ),
    Row(
        name="ormo_la_da",
        reference=reference.OrMoLADA,
        vectors=lambda _: 2,
        lr=0.01,
        variants=({}, {"rule": DelayRule.drop, "threshold": 1}, {"threshold": 1, **CORRECTED}),
        reductions=(
            Reduction(to="ormo_la", options={"threshold": 1000}),
            Reduction(to="asgd_da", momentum=0.0),
        ),
        torch_sgd=CORRECTED,
    ),
    Row(
        name="ormo_vanilla",
        reference=reference.OrMoVanilla,
        vectors=lambda _: 2,
        lr=0.01,
        variants=({}, CORRECTED),
        reductions=(
            Reduction(to="asgd", momentum=0.0),
            # Under sync every gradient is of the newest bucket, e = 0.
            Reduction(to="ormo", num_workers=3, schedulers=("sync",)),
        ),
        torch_sgd=CORRECTED,
    ),
    Row(
        name="rennala",
        reference=reference_batching.Rennala,
        vectors=lambda _: 2,
        lr=0.4,
        variants=({}, {"batch": 1}, {"batch": 3}),
        schedulers=("async",),
        reductions=(Reduction(to="asgd", options={"batch": 1}, num_workers=1, schedulers=("async",)),),
    ),
    Row(
        name="ringmaster",
        reference=reference_batching.Ringmaster,
        vectors=lambda _: 1,
        lr=0.1,
        variants=({}, {"delay_threshold": 1}, {"delay_threshold": 3}),
        schedulers=("async",),
        reductions=(Reduction(to="asgd", options={"delay_threshold": 1000}, schedulers=("async",)),),
    ),
    Row(
        name="ringleader",
        reference=reference_ringleader.Ringleader,
        vectors=lambda workers: 2 + 2 * workers,
        lr=0.15,
        reductions=(Reduction(to="asgd", num_workers=1),),
    ),
    Row(
        name="ringmaster_lmo",
        reference=reference_directions.RingmasterLMO,
        vectors=lambda _: 2,
        lr=0.1,
        variants=({}, {"delay_threshold": 3, "newton_schulz_steps": 1}, {"lmo": Lmo.identity}),
        schedulers=("async",),
        reductions=(
            Reduction(to="asgd", options={"lmo": Lmo.identity, "delay_threshold": 1000}, momentum=0.0, schedulers=("async",)),
        ),
    ),
    Row(
        name="m_sync",
        reference=reference_rounds.MSync,
        vectors=lambda _: 3,
        lr=0.04,
        variants=({}, {"m": 2}, {"nesterov": True, "m": 3}, {"m": 2, "cancel": True}),
        schedulers=("async",),
        torch_sgd={},
    ),
    Row(
        name="local_sgd",
        reference=reference_rounds.LocalSGD,
        vectors=lambda _: 3,
        lr=0.04,
        variants=({}, {"outer_lr": 0.7, "outer_momentum": 0.9}, {"outer_momentum": 0.5, "outer_nesterov": False}),
        schedulers=("async",),
    ),
    Row(
        name="fedbuff",
        reference=reference_batching.FedBuff,
        vectors=lambda _: 2,
        lr=0.4,
        variants=({}, {"buffer": 1, "staleness_power": 0.5}, {"buffer": 3, "staleness_power": 0.5}),
        reductions=(Reduction(to="asgd", options={"buffer": 1}),),
    ),
    Row(
        name="delayed_nesterov",
        reference=reference_batching.DelayedNesterov,
        vectors=lambda _: 3,
        lr=0.04,
        variants=({}, {"period": 1}, {"period": 3, "activation": 0.2}, {"period": 1, "activation": 0.5}),
        reductions=(Reduction(to="asgd", options={"period": 1}, momentum=0.0),),
        torch_sgd={"period": 1},
        nesterov=True,
    ),
    Row(
        name="easgd",
        reference=reference_batching.EASGD,
        vectors=lambda workers: 1 + workers,
        lr=0.1,
        variants=({}, {"elasticity": 0.3}, {"elasticity": 1.0}),
    ),
    Row(
        name="halos",
        reference=reference_levels.HALoS,
        vectors=lambda _: 11,
        lr=0.2,
        remaining=1e-6,  # a region goes a quarter of the way at each of its 66 exchanges
        variants=(
            {},
            {"exchange": 2, "region_period": 3, "merge_weight": 0.6},
            {"exchange": 1, "region_period": 1, "global_period": 1, "merge_weight": 1.0},
            {"region_workers": 3, "global_period": 3},
        ),
        more_vectors=lambda options: -8 if options.get("region_workers") else 0,
    ),
    Row(
        name="hiermo",
        reference=reference_levels.HierMo,
        vectors=lambda _: 11,
        lr=0.02,
        variants=({}, {"edge_rounds": 1}, {"edge_rounds": 3, "edge_momentum": 0.4}),
        schedulers=("async",),
    ),
    Row(
        name="orlomo",
        reference=reference_batching.OrLoMo,
        vectors=lambda _: 2,
        lr=0.01,
        variants=(
            {},
            {"local_steps": 1, **CORRECTED},
            CORRECTED,
            {"combine": Combine.mean},
            {"combine": Combine.mean, **CORRECTED},
        ),
        torch_sgd=CORRECTED,
    ),
    Row(
        name="mla",
        reference=reference_local_steps.MLA,
        vectors=lambda _: 2,
        lr=0.02,
        variants=({}, {"outer_lr": 1.0, "look_ahead": False}, CORRECTED),
    ),
    Row(
        name="heloco",
        reference=reference_local_steps.HeLoCo,
        vectors=lambda _: 2,
        lr=0.02,
        variants=({}, {"cosine_ok": 0.9, "shrink": 2.0, "momentum_weight": 0.5}, CORRECTED),
        reductions=(Reduction(to="mla", options={"cosine_ok": -1.0}),),
    ),
    Row(
        name="pnm",
        reference=reference_batching.PNM,
        vectors=lambda _: 3,
        lr=0.4,
        variants=({}, {"beta2": 0.5}),
        reductions=(Reduction(to="asgd", options={"beta2": 0.0}, momentum=0.0),),
    ),
    Row(
        name="spa",
        reference=reference_batching.SPA,
        vectors=lambda _: 2,
        lr=0.01,
        variants=({}, {"averaging": 0.5}, {"averaging": 1.0}, CORRECTED, {"averaging": 0.5, **CORRECTED}),
        reductions=(Reduction(to="asgd", momentum=0.0), Reduction(to="naive", exact=False)),
        torch_sgd=CORRECTED,
    ),
    Row(
        name="shifted",
        reference=reference_peers.Shifted,
        vectors=lambda num_workers: 1 + num_workers,
        lr=0.01,
        variants=({}, CORRECTED),
        reductions=(Reduction(to="asgd", momentum=0.0, exact=False), Reduction(to="naive", num_workers=1)),
        torch_sgd=CORRECTED,
    ),
    Row(
        name="dana",
        reference=reference_peers.DANA,
        vectors=lambda num_workers: 2 + num_workers,
        lr=0.01,
        reductions=(Reduction(to="asgd", momentum=0.0),),
        torch_sgd={},
    ),
    Row(
        name="smega2",
        reference=reference_peers.SMEGA2,
        vectors=lambda _: 3,
        lr=0.01,
        reductions=(
            Reduction(to="asgd", momentum=0.0),
            # Both are Nesterov momentum with one worker, which never leaves.
            Reduction(to="dana", num_workers=1, exact=False),
        ),
        torch_sgd={},
    ),
    Row(
        name="asgd_da",
        reference=reference_peers.ASGDDA,
        vectors=lambda _: 1,
        lr=0.1,
        variants=DELAY_ADAPTIVE,
        reductions=(
            Reduction(to="asgd", options={"threshold": 1000}),
            Reduction(to="asgd", options={"rule": DelayRule.drop, "threshold": 1000}),
            Reduction(to="asgd", num_workers=1),
            Reduction(to="asgd", options={"rule": DelayRule.mishchenko}, num_workers=3, schedulers=("sync",)),
            Reduction(to="ormo_da", momentum=0.0),
        ),
    ),
    Row(
        name="staleness_aware",
        reference=reference_peers.StalenessAware,
        vectors=lambda _: 1,
        lr=0.1,
        schedulers=("async", "ssp"),
        reductions=(Reduction(to="asgd", num_workers=1, schedulers=("async", "ssp")),),
    ),
    Row(
        name="dc_asgd",
        reference=reference_peers.DCASGD,
        vectors=lambda _: 1,
        more_vectors=lambda options: int(options.get("adaptive", True)),
        lr=0.1,
        variants=({}, {"adaptive": False}, {"compensation": 0.5}, {"adaptive": False, "compensation": 0.5}),
        reductions=(
            Reduction(to="asgd", options={"compensation": 0.0}),
            Reduction(to="asgd", options={"compensation": 0.0, "adaptive": False}),
            Reduction(to="asgd", num_workers=1),
        ),
    ),
    Row(
        name="gap_aware",
        reference=reference_peers.GapAware,
        vectors=lambda _: 3,
        lr=0.01,
        reductions=(Reduction(to="asgd", momentum=0.0, num_workers=1),),
        torch_sgd={},
    ),
    Row(
        name="adamw",
        reference=reference_adamw.AdamW,
        vectors=lambda _: 3,
        lr=0.005,
        remaining=0.01,
        variants=({}, {"beta2": 0.9, "eps": 1e-3}, {"beta2": 0.0}),
    ),
    Row(
        name="adamw_da",
        reference=reference_adamw.AdamWDA,
        vectors=lambda _: 3,
        lr=0.005,
        remaining=0.01,
        variants=DELAY_ADAPTIVE,
        reductions=(
            Reduction(to="adamw", options={"threshold": 1000}),
            Reduction(to="adamw", options={"rule": DelayRule.drop, "threshold": 1000}),
            Reduction(to="adamw", num_workers=1),
            Reduction(to="adamw", options={"rule": DelayRule.mishchenko}, num_workers=3, schedulers=("sync",)),
        ),
    ),
    Row(
        name="ormo_adamw",
        reference=reference_adamw.OrMoAdamW,
        vectors=lambda _: 6,
        more_vectors=lambda options: options.get("window", 1) - 1,
        lr=0.1,
        variants=({}, {"window": 0}, {"window": 3}, {"beta2": 0.9, "eps": 1e-3}),
        reductions=(Reduction(to="adamw", num_workers=1), Reduction(to="adamw", options={"window": 0}, num_workers=1)),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run of any algorithm, the same for all rows.

    Attributes:
        variant: Picks one of the row's variants.
        num_workers: K at the start.
        tickets: T.
        momentum: beta.
        lr: The name of a schedule of learning rates.
        seed: Of the start and the gradients.
        schedule: The pushes, joins and leaves.
    """

    variant: int
    num_workers: int
    tickets: int
    momentum: float
    lr: str
    seed: int
    schedule: Schedule

    def options(self, row: Row) -> Mapping[str, Any]:
        """Return the options of the variant."""
        return row.variants[self.variant % len(row.variants)]

    def start(self) -> Tensor:
        """Return ``w_0``, shape (D,)."""
        return torch.randn(DIMENSION, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)

    def reference(self, row: Row) -> reference.Reference:
        """Build the reference implementation."""
        return row.reference(
            self.start(),
            num_workers=self.num_workers,
            lr=LEARNING_RATES[self.lr],
            momentum=self.momentum,
            shapes=SHAPES,
            **self.options(row),
        )

    def server(
        self, name: str, scheduler: str, options: Mapping[str, Any], record: list[Event] | None = None
    ) -> ParameterServer:
        """Build a server with an algorithm; its events go to ``record``."""
        return build_server(
            algorithm=name,
            scheduler=scheduler,
            params=self.start(),
            num_workers=self.num_workers,
            lr=LEARNING_RATES[self.lr],
            momentum=self.momentum,
            total_tickets=self.tickets,
            shapes=SHAPES,
            record=(lambda _: None) if record is None else record.append,
            **SCHEDULER_OPTIONS.get(scheduler, {}),
            **options,
        )

    def run(
        self, name: str, scheduler: str, options: Mapping[str, Any], record: list[Event] | None = None
    ) -> Run[ParameterServer]:
        """Start a run of such a server."""
        server = self.server(name, scheduler, options, record)
        gradient = noise(DIMENSION * server.algorithm.VECTORS_PUSHED, self.seed)
        return Run(server=server, gradient=gradient, num_workers=self.num_workers).start()


@st.composite
def cases(draw: st.DrawFn, *, changes: bool = True, momentum: float | None = None, num_workers: int | None = None) -> Case:
    """Draw runs of every kind, also with T < K and T no multiple of K; with ``changes`` workers join and leave."""
    return Case(
        variant=draw(st.integers(0, 99)),
        num_workers=draw(st.integers(1, 5)) if num_workers is None else num_workers,
        tickets=draw(st.integers(1, 25)),
        momentum=draw(st.sampled_from([0.9, 0.5, 0.0])) if momentum is None else momentum,
        lr=draw(st.sampled_from(sorted(LEARNING_RATES))),
        seed=draw(st.integers(0, 9)),
        schedule=draw(schedules(changes=changes)),
    )


def values(server: ParameterServer) -> dict[str, Tensor | int | float]:
    """Return ``w`` and the state of the algorithm."""
    return {"w": server.params, **server.algorithm.state_dict()}


def same(a: Any, b: Any) -> bool:
    """Tell if two nested values are identical, tensors to the bit."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return type(a) is type(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)


def tensors(value: Any, seen: set[int] | None = None) -> list[Tensor]:
    """Return every tensor that an object holds at any depth, each once."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        inner = list(value.values())
    elif isinstance(value, (str, bytes, int, float, type)) or callable(value):
        inner = []
    elif hasattr(value, "__iter__"):
        inner = list(value)
    else:
        inner = list(getattr(value, "__dict__", {}).values())
    return [tensor for item in inner for tensor in tensors(item, seen)]
