"""The few numbers that ranks tell one another beside gradients: losses for the records, and whether the run goes on.

Ranks meet after a number of rounds that rank 0 has told at the last meeting, about ten times a second. Meanwhile each one keeps
its losses. At a meeting all wait for rank 0, which may evaluate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
import torch.distributed as dist

from ormo_rpc.runtimes.ddp.trainer import Computed

MAX_ROUNDS = 64
"""Rounds between two meetings."""


class Verdict(IntEnum):
    """The decision of rank 0 at a meeting."""

    proceed = 0
    end = 1
    """Every ticket is done, or the run ends before its time."""
    interrupt = 2
    """A signal has asked for it."""


@dataclass(frozen=True)
class Reports:
    """The reports of all ranks to rank 0 at a meeting.

    Attributes:
        computed: The results of each rank, by round and rank.
        signal: The number of a signal that asks one of the ranks to end; 0 for none.
    """

    computed: Sequence[Sequence[Computed]]
    signal: int


@dataclass(frozen=True)
class Decision:
    """The answer of rank 0 to all ranks at a meeting.

    Attributes:
        verdict: The decision.
        rounds: The number of rounds to the next meeting.
        signal: The signal that interrupts them; 0 for none.
    """

    verdict: Verdict
    rounds: int = 1
    signal: int = 0


def meet(mine: Sequence[Computed], signal: int, decide: Callable[[Reports], Decision] | None) -> Decision:
    """Tell what this rank has computed since the last meeting; return what rank 0 decides.

    Args:
        mine: By round; all ranks have as many.
        signal: The number of the signal that asks this rank to end; 0 for none.
        decide: Of rank 0; None elsewhere.

    Raises:
        RuntimeError: a rank was lost.
    """
    losses = [math.nan if each.loss is None else each.loss for each in mine]
    told = torch.tensor([float(signal), *losses, *(float(each.samples) for each in mine)], dtype=torch.float64)
    reports = [torch.empty_like(told) for _ in range(dist.get_world_size())]
    dist.all_gather(reports, told)
    answer = torch.zeros(3, dtype=torch.int64)
    if decide is not None:
        decision = decide(_parsed([each.tolist() for each in reports], len(mine)))
        answer = torch.tensor([decision.verdict, decision.rounds, decision.signal])
    dist.broadcast(answer, 0)
    verdict, rounds, number = answer.tolist()
    return Decision(Verdict(verdict), rounds, number)


def _parsed(reports: Sequence[Sequence[float]], rounds: int) -> Reports:
    computed = [
        [Computed(each[1 + number] if each[1 + rounds + number] else None, int(each[1 + rounds + number])) for each in reports]
        for number in range(rounds)
    ]
    return Reports(computed, max(int(each[0]) for each in reports))
