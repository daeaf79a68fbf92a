"""Rows of algorithms that gather pushes, or whose workers take local steps."""

from __future__ import annotations

from ormo_rpc.algorithms.orlomo import Combine
from tests.support import reference_batching, reference_levels, reference_local_steps, reference_ringleader, reference_rounds
from tests.support.contract_row import CORRECTED, Reduction, Row

ROUNDS = (
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
        name="ringleader",
        reference=reference_ringleader.Ringleader,
        vectors=lambda workers: 2 + 2 * workers,
        lr=0.15,
        reductions=(Reduction(to="asgd", num_workers=1),),
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
)
