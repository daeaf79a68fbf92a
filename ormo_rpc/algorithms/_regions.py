"""Algorithms of two levels: workers belong to regions, which may have servers of their own."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from typing_extensions import override

from ormo_rpc.algorithms._local_steps import LocalSteps
from ormo_rpc.options import at_least_one, option


@dataclass(kw_only=True)
class RegionRule(LocalSteps):
    """The rule of a region's own server; `RegionServer` says when it sends and merges."""

    @abstractmethod
    def merge(self, sent: torch.Tensor) -> None:
        """Take over what the server of the regions has sent with a ticket, one or more vectors of D."""

    @abstractmethod
    def displacement(self) -> torch.Tensor:
        """Return the region's push: how far it has moved, and count from here."""


@dataclass(kw_only=True)
class TwoLevels(LocalSteps):
    """An algorithm whose regions are on the one server, or are its workers, each with a server of its own."""

    regions: int = option(2, "R; worker k belongs to region k modulo R", valid=at_least_one, expected="a whole number >= 1")
    region_workers: int | None = option(
        None,
        "every worker is a region, with a server and this many workers of its own; default: regions live on the one server",
        valid=at_least_one,
        expected="a whole number >= 1",
    )

    @property
    @abstractmethod
    def region_parts(self) -> int:
        """The tickets of a region's own workers that make up one of the region's, where it has a server of its own."""

    @abstractmethod
    def region_rule(self) -> RegionRule:
        """Return the algorithm of a region's own server."""

    @property
    @override
    def steps(self) -> int:
        return self.local_steps * (1 if self.region_workers is None else self.region_parts)

    @property
    @override
    def workers_are_regions(self) -> bool:
        return self.region_workers is not None
