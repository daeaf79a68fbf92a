"""The contenders: their rules and variants, and the times of their rounds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from typing_extensions import override

from experiments.race.clocks import Clock, Draw, first, in_local_steps, mean_slowdowns, proportional
from experiments.race.runs import QUIET, Record, Store
from experiments.race.setup import DEFAULT_MOMENTUM, Setup
from ormo_rpc.composing import compose
from ormo_rpc.config.schema import Config
from ormo_rpc.runtimes.configured import time_generator

LOCAL_STEPS = (4, 16)
"""Local steps of local SGD."""
FEWEST = 8
"""Gradients in the smallest rounds of m-synchronous SGD that are tried, where that is less than half of the workers."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A contender with its options, for one number of workers.

    Attributes:
        name: Its options in words; empty where there is one variant.
        overrides: The rule.
        members: The virtual workers of its run.
        divisor: The learning rate of the run is the rate divided by this.
        steps: Gradients in a ticket.
        clock: Makes the times of its rounds in a setting, with batches of a size; None: it is run in the setting itself.
    """

    name: str = ""
    overrides: tuple[str, ...]
    members: int
    divisor: int = 1
    steps: int = 1
    clock: Callable[[str, int], Clock] | None = None

    def between(self, about: int) -> int:
        """Gradients between evaluations, about so many: a whole number of rounds."""
        per_round = self.members * self.steps
        return per_round * max(1, round(about / per_round))


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A rule that somebody would pick.

    Attributes:
        label: Its name in tables and pictures.
        variants: Its variants for a number of workers.
        tuned_as: The contender with the same updates at other times: its variant and rate are taken where it has been tuned,
            as the best ones are the same but for the noise of tuning, and rounding on another machine.
    """

    label: str
    variants: Callable[[int], tuple[Variant, ...]]
    tuned_as: str = ""


@dataclass(frozen=True)
class Unit:
    """One contender in one cell."""

    setting: str
    workers: int
    contender: str

    @override
    def __str__(self) -> str:
        return f"{self.setting}, K = {self.workers}, {self.contender}"


def variants_of(contender: str, workers: int, momenta: Sequence[float]) -> tuple[Variant, ...]:
    """A contender's variants for a number of workers, each with each of these momentum coefficients.

    With the default one alone their names do not tell it.
    """
    found = CONTENDERS[contender].variants(workers)
    if [*momenta] == [DEFAULT_MOMENTUM]:
        return found
    return tuple(
        dataclasses.replace(
            each,
            name=", ".join(filter(None, (each.name, f"momentum {momentum:g}"))),
            # Without an override where it is the default, so that such a run is one of the race.
            overrides=(*each.overrides, *([] if momentum == DEFAULT_MOMENTUM else [f"train.momentum={momentum:g}"])),
        )
        for each in found
        for momentum in momenta
    )


def record(
    variant: Variant,
    setup: Setup,
    store: Store,
    *,
    setting: str,
    workers: int,
    rate: float,
    seed: int,
    split: str,
    limit: float,
) -> Record:
    """A run of a variant in a cell, with its times there.

    Args:
        variant: The variant.
        setup: The job.
        store: Has the runs, and makes those that are missing.
        setting: The speeds.
        workers: K.
        rate: The learning rate of a step with a mean.
        seed: The seed.
        split: ``test`` or ``validation``.
        limit: Virtual seconds after which the run may end; infinite for none. A synchronous run is always complete, as all
            settings have it in common.
    """
    every = variant.between(setup.every) // variant.steps
    heterogeneity = setting if variant.clock is None else "none"
    overrides = [
        *(*setup.job, *setup.where, f"train.epochs={setup.epochs}"),
        *(f"train.batch_size={setup.batch_size}", f"evaluate.every={every}"),
        *(*variant.overrides, f"workers={variant.members}", f"heterogeneity={heterogeneity}"),
        *(f"train.lr={rate / variant.divisor:.8g}", f"seed={seed}"),
    ]
    if variant.clock is None:
        if limit < float("inf"):
            overrides.append(f"train.max_seconds={limit:.4f}")
        return store.run(overrides, split)
    found = store.run(overrides, split)
    rounds = -(-found.iterations[-1] // variant.members) if found.iterations else 0
    ends = round_ends(variant, setting, workers, seed, rounds, batch_size=setup.batch_size)
    seconds = [ends[-(-iteration // variant.members) - 1] for iteration in found.iterations]
    return Record(
        status=found.status,
        iterations=[iteration * variant.steps for iteration in found.iterations],
        seconds=seconds,
        accuracy=found.accuracy,
        cpu_seconds=found.cpu_seconds,
        machine=found.machine,
    )


def round_ends(variant: Variant, setting: str, workers: int, seed: int, rounds: int, *, batch_size: int) -> list[float]:
    """The virtual seconds at which a synchronous variant's rounds end in a setting, from the simulator's own draws."""
    assert variant.clock is not None, "of rounds"
    draw = in_local_steps(draws(setting, workers, seed), variant.steps)
    return variant.clock(setting, batch_size)(draw, workers, rounds)


def draws(setting: str, workers: int, seed: int) -> Draw:
    """The times that the simulator draws for each worker's tickets, in its order."""
    config = _cell(setting, workers, seed)
    generators = [time_generator(config, worker) for worker in range(workers)]
    return lambda worker: config.sim.compute_seconds * config.slowdown(worker, generators[worker])


@functools.lru_cache(maxsize=64)
def _cell(setting: str, workers: int, seed: int) -> Config:
    return compose((*QUIET, f"workers={workers}", f"heterogeneity={setting}", f"seed={seed}"))


def _rounds(*, nesterov: bool = False) -> tuple[str, ...]:
    """The rule of rounds of all members, a step with the mean: heavy ball, or Nesterov."""
    if nesterov:
        return ("algorithm=m_sync", "algorithm.nesterov=true")
    # The parameters of algorithm=m_sync, up to rounding, by the rule of the asynchronous contenders.
    return ("algorithm=ormo", "scheduler=sync", "train.lr_scaling=mean")


def _ddp(*, nesterov: bool = False) -> Callable[[int], tuple[Variant, ...]]:
    return lambda workers: (
        Variant(overrides=_rounds(nesterov=nesterov), members=workers, clock=lambda *_: first(workers, cancel=False)),
    )


def _ddp_proportional(*, nesterov: bool = False) -> Callable[[int], tuple[Variant, ...]]:
    """Batches in proportion to the workers' mean speeds: the updates of DDP at other times."""

    def variants(workers: int) -> tuple[Variant, ...]:
        def clock(setting: str, batch_size: int) -> Clock:
            return proportional(mean_slowdowns(setting, workers), batch_size)

        return (Variant(overrides=_rounds(nesterov=nesterov), members=workers, clock=clock),)

    return variants


def _m_sync(*, cancel: bool, nesterov: bool = False) -> Callable[[int], tuple[Variant, ...]]:
    """Rounds of the first m: all but one, three quarters, a half, and halves of that down to `FEWEST`."""

    def variants(workers: int) -> tuple[Variant, ...]:
        counts = [workers - 1, 3 * workers // 4, workers // 2]
        while counts[-1] >= 2 * FEWEST:
            counts.append(counts[-1] // 2)

        def variant(m: int) -> Variant:
            return Variant(
                name=f"m = {m}",
                overrides=_rounds(nesterov=nesterov),
                members=m,
                clock=lambda *_: first(m, cancel=cancel),
            )

        return tuple(map(variant, dict.fromkeys(counts)))

    return variants


def _local_sgd(*options: str) -> Callable[[int], tuple[Variant, ...]]:
    def variants(workers: int) -> tuple[Variant, ...]:
        return tuple(
            Variant(
                name=f"H = {steps}",
                overrides=("algorithm=local_sgd", f"algorithm.local_steps={steps}", *options),
                members=workers,
                steps=steps,
                clock=lambda *_: first(workers, cancel=False),
            )
            for steps in LOCAL_STEPS
        )

    return variants


def _asynchronous(*rule: str) -> Callable[[int], tuple[Variant, ...]]:
    """A rule that applies each gradient as it comes."""
    return lambda workers: (Variant(overrides=rule, members=workers, divisor=workers),)


def _partial(*rule: str) -> Callable[[int], tuple[Variant, ...]]:
    """A rule that applies each gradient as it comes, and answers k workers together, from all but one to a quarter."""
    return lambda workers: tuple(
        Variant(name=f"k = {k}", overrides=(*rule, "scheduler=partial", f"scheduler.k={k}"), members=workers, divisor=workers)
        for k in sorted({workers - 1, workers // 2, workers // 4}, reverse=True)
    )


CONTENDERS: dict[str, Contender] = {
    "ddp": Contender(label="DDP", variants=_ddp()),
    "ddp_nesterov": Contender(label="DDP, Nesterov", variants=_ddp(nesterov=True)),
    "ddp_proportional": Contender(label="DDP, proportional", variants=_ddp_proportional()),
    "ddp_proportional_nesterov": Contender(
        label="DDP, proportional, Nesterov", variants=_ddp_proportional(nesterov=True), tuned_as="ddp_nesterov"
    ),
    "m_sync": Contender(label="m-sync", variants=_m_sync(cancel=False)),
    "m_sync_cancel": Contender(label="m-sync, cancelling", variants=_m_sync(cancel=True)),
    "m_sync_nesterov": Contender(label="m-sync, cancelling, Nesterov", variants=_m_sync(cancel=True, nesterov=True)),
    "local_sgd": Contender(label="local SGD", variants=_local_sgd()),
    "diloco": Contender(label="DiLoCo", variants=_local_sgd("algorithm.outer_lr=0.7", "algorithm.outer_momentum=0.9")),
    "ormo": Contender(label="ormo", variants=_asynchronous("algorithm=ormo")),
    "ormo_da": Contender(label="ormo_da", variants=_asynchronous("algorithm=ormo_da")),
    "ormo_la": Contender(label="ormo_la", variants=_asynchronous("algorithm=ormo_la")),
    "ormo_la_partial": Contender(label="ormo_la, partial", variants=_partial("algorithm=ormo_la")),
    "ormo_la_da": Contender(label="ormo_la_da", variants=_asynchronous("algorithm=ormo_la_da")),
    "smega2": Contender(label="smega2", variants=_asynchronous("algorithm=smega2")),
    "dana": Contender(label="dana", variants=_asynchronous("algorithm=dana")),
}
"""Contenders in the order of the tables."""
FIRST = ("ddp", "ormo", "ormo_la", "m_sync", "m_sync_cancel", "ddp_nesterov", "ddp_proportional", "local_sgd", "smega2")
"""Those that are run first, in this order."""
ASYNCHRONOUS = ("ormo", "ormo_da", "ormo_la", "ormo_la_partial", "ormo_la_da", "smega2", "dana")
