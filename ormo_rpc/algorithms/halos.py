"""HALoS: delayed Nesterov momentum in every region, and over the regions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from typing_extensions import override

from ormo_rpc.algorithms._local_steps import LocalSteps, sgd_steps
from ormo_rpc.algorithms._regions import RegionRule, TwoLevels
from ormo_rpc.algorithms.base import LocalWork, PullContext, PushContext
from ormo_rpc.algorithms.delayed_nesterov import DelayedNesterov
from ormo_rpc.options import at_least_one, not_negative, option, positive, register


@dataclass(kw_only=True)
class RegionOptions(LocalSteps):
    """The options of a region, and what its workers do."""

    region_lr: float = option(0.2, "l, of a worker's displacement", valid=positive, expected="a finite number > 0")
    region_momentum: float = option(0.9, "beta, of a region", valid=lambda v: 0 <= v < 1, expected="a number in [0, 1)")
    region_period: int = option(
        4, "N, pushes for each change of a region's momentum", valid=at_least_one, expected="a whole number >= 1"
    )
    merge_weight: float = option(
        0.25,
        "a, the part of the way to the global parameters that a region goes when it gets them",
        valid=lambda v: 0 <= v <= 1,
        expected="a number in [0, 1]",
    )

    @override
    def local(self, work: LocalWork, push: torch.Tensor) -> None:
        sgd_steps(work, push)


class Region:
    """A region's parameters ``th``, those of its newest merge, and its delayed Nesterov momentum; four vectors of D.

    Args:
        start: The parameters to begin with, shape (D,); copied.
        options: Those of the algorithm.
    """

    def __init__(self, start: torch.Tensor, options: RegionOptions) -> None:
        self.lr = options.region_lr * options.region_period
        self.merge_weight = options.merge_weight
        self.rule = DelayedNesterov(period=options.region_period)
        self.rule.init(start.clone(), options.region_momentum)
        self.merged = start.clone()
        self.unsent = 0
        """Pushes since the displacement was last sent."""

    def add(self, moved: torch.Tensor) -> None:
        """Apply a worker's displacement, start minus end."""
        self.rule.add(moved, self.lr)
        self.unsent += 1

    def finish(self) -> bool:
        """Close the round of the momentum; tell if there is anything to send."""
        waiting = self.unsent > 0 or self.rule.count > 0
        self.rule.flush(self.lr)
        return waiting

    def displacement(self) -> torch.Tensor:
        """Return ``D``, newest merge minus present parameters, and count from here."""
        moved = self.merged - self.rule.params
        self.merged.copy_(self.rule.params)
        self.unsent = 0
        return moved

    def merge(self, params: torch.Tensor) -> None:
        """Go a part of the way to the global parameters; what is unsent stays so."""
        unsent = self.merged - self.rule.params if self.unsent else None
        self.rule.params.mul_(1 - self.merge_weight).add_(params, alpha=self.merge_weight)
        self.merged.copy_(self.rule.params)
        if unsent is not None:
            self.merged.add_(unsent)

    def state_dict(self) -> dict[str, torch.Tensor | int | float]:
        """Return everything that the next step depends on, live."""
        return {"th": self.rule.params, "merged": self.merged, "unsent": self.unsent, **self.rule.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.rule.load_state_dict(state)
        self.rule.params.copy_(state["th"])
        self.merged.copy_(state["merged"])
        self.unsent = state["unsent"]


@dataclass(kw_only=True)
class HALoSRegion(RegionOptions, RegionRule):
    """The rule of a region's own server."""

    @override
    def init(self, params: torch.Tensor, momentum: float) -> None:
        super().init(params, momentum)
        self.region = Region(params, self)
        self.params = self.region.rule.params

    @override
    def step(self, grad: torch.Tensor, lr: float, context: PushContext) -> None:
        self.region.add(grad)

    @override
    def merge(self, sent: torch.Tensor) -> None:
        self.region.merge(sent)

    @override
    def displacement(self) -> torch.Tensor:
        return self.region.displacement()

    @override
    def state_dict(self) -> Mapping[str, torch.Tensor | int | float]:
        return self.region.state_dict()

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.region.load_state_dict(state)
        self.params = self.region.rule.params


@register("halos")
@dataclass(kw_only=True)
class HALoS(RegionOptions, TwoLevels):
    """HALoS: workers take H steps from their region's parameters, and regions send what came of them to the global ones.

    Worker k belongs to region k modulo R. A ticket is H steps ``x <- x - eta g`` from the region's ``th``, of which the worker
    pushes ``d = start - end``, at the ``eta`` of the ticket's issue. A push is one of `delayed_nesterov` in its region:
    ``th <- th - l d``, and with every N-th ``m <- beta m + (sum of those d) / N; th <- th - l N beta m``. After every J-th push
    the region sends ``D = merged - th``, with which the global ``w`` makes a step of `delayed_nesterov` of its own (L, N_g,
    beta_g in place of l, N, beta). The region then takes over ``th <- (1 - a) th + a w; merged <- th``.

    The rates l and L are pure numbers. A constant gradient moves ``w`` by ``H eta g l L / ((1 - beta) (1 - beta_g))`` with each
    ticket, for any R, J and a. Memory: ``w`` and two more for the global momentum, four for each region, ``3 + 4 R`` vectors of
    D; a worker needs two more while it works. ``train.momentum`` is not read, as each level has its own.

    With ``region_workers`` each worker of the server is a region: a server of its own with that many workers (`RegionServer`).
    A ticket is then J tickets of its workers, and its push is ``D``. The region merges when it gets the next one;
    with ``worker.prefetch=1`` it has that before it is done, and goes on while ``D`` and the reply travel. What it has done
    since it sent is not lost in a merge, but is part of the next ``D``: here the authors' code drops it. ``th`` and the
    momentum of a region are lost with it, and one that joins begins at ``w``.

    Source: Kim et al., ICML 2025, arXiv 2506.04531, and the authors' public code, whose l, L, beta, beta_g, N_g and a are the
        defaults; theirs are H = 8, J = 32, N = 16. Departures: without ``region_workers`` the exchange takes no time, and a
        region whose workers have left keeps its state; plain steps on the workers in place of AdamW; when the run ends, the
        regions close their rounds and send what they have not sent, in order, and the global round is closed.
    """

    exchange: int = option(
        12, "J, pushes in a region after which it sends what came of them", valid=at_least_one, expected="a whole number >= 1"
    )
    global_lr: float = option(0.15, "L, of a region's displacement", valid=not_negative, expected="a finite number >= 0")
    global_momentum: float = option(
        0.5, "beta_g, of the regions together", valid=lambda v: 0 <= v < 1, expected="a number in [0, 1)"
    )
    global_period: int = option(
        2, "N_g, displacements of regions for each change of that momentum", valid=at_least_one, expected="a whole number >= 1"
    )

    @property
    @override
    def region_parts(self) -> int:
        return self.exchange

    @override
    def region_rule(self) -> HALoSRegion:
        return HALoSRegion(**{name: getattr(self, name) for name in HALoSRegion.declared()})

    @override
    def init(self, params: torch.Tensor, momentum: float) -> None:
        super().init(params, momentum)
        self.outer = DelayedNesterov(period=self.global_period)
        self.outer.init(params, self.global_momentum)
        self.areas = [Region(params, self) for _ in range(self.regions if self.region_workers is None else 0)]

    @override
    def step(self, grad: torch.Tensor, lr: float, context: PushContext) -> None:
        if not self.areas:
            self._send(grad)
            return
        region = self.areas[context.worker % self.regions]
        region.add(grad)
        if region.unsent == self.exchange:
            self._exchange(region)

    @override
    def flush(self, lr: float) -> None:
        for region in self.areas:
            if region.finish():
                self._exchange(region)
        self.outer.params = self.params
        self.outer.flush(self.global_lr * self.global_period)

    def _exchange(self, region: Region) -> None:
        """Let a region send what is unsent, and merge with what comes of it."""
        self._send(region.displacement())
        region.merge(self.params)

    def _send(self, moved: torch.Tensor) -> None:
        """Apply a region's displacement."""
        self.outer.params = self.params  # those of a loaded state are another tensor
        self.outer.add(moved, self.global_lr * self.global_period)

    @override
    def outgoing(self, context: PullContext) -> torch.Tensor:
        return self.areas[context.worker % self.regions].rule.params if self.areas else self.params

    @override
    def state_dict(self) -> Mapping[str, torch.Tensor | int | float]:
        kept = dict(self.outer.state_dict())
        for number, region in enumerate(self.areas):
            kept |= {f"region_{name}/{number}": value for name, value in region.state_dict().items()}
        return kept

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.outer.load_state_dict({name: state[name] for name in self.outer.state_dict()})
        for number, region in enumerate(self.areas):
            region.load_state_dict({name: state[f"region_{name}/{number}"] for name in region.state_dict()})
