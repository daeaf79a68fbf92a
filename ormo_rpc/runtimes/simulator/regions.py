"""A virtual cluster of two levels: each worker of the server is a region, a server with virtual workers of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from typing_extensions import override

from ormo_rpc.messages import Push, Reply
from ormo_rpc.runtimes.simulator.clock import EventQueue
from ormo_rpc.runtimes.simulator.cluster import Cluster, GradientSource, Links, Speeds
from ormo_rpc.server.parameter_server import ParameterServer
from ormo_rpc.server.region import RegionServer

KEPT_EVENTS = ("join", "leave", "finish")
"""Events of a saved queue: those of the configuration. All others hang on a region, whose state is not saved."""


class PushesInFlight:
    """The pushes of regions that have not arrived yet."""

    AHEAD: ClassVar[int] = 0

    def __init__(self) -> None:
        self.pushes: dict[tuple[int, int], Push] = {}
        """By worker and ticket."""

    def begin(self, *replies: Reply) -> None:
        """Do nothing: they are there."""

    def compute(self, reply: Reply) -> Push:
        """Return the push for a reply."""
        assert reply.ticket is not None
        return self.pushes.pop((reply.worker, reply.ticket))

    def forget(self, worker: int | None = None) -> None:
        """Forget what a worker, or all, had on the way."""
        self.pushes = {key: push for key, push in self.pushes.items() if worker is not None and key[0] != worker}

    def state_dict(self) -> dict[int, dict[str, Any]]:
        """Return nothing: what is on the way is not saved."""
        return {}

    def load_state_dict(self, state: Mapping[int, Mapping[str, Any]]) -> None:  # noqa: ARG002 - there is nothing in it
        """Begin with nothing on the way."""
        self.pushes.clear()


class RegionalCluster(Cluster):
    """A global server, and regions on the same event queue, each a `RegionServer` with virtual workers.

    Worker w of the global server is region ``w`` modulo ``regions``: with tickets ahead a region has several memberships. One
    that joins, whose number is none of those at the start, is a region of its own. Local worker j of region r has the number
    ``r + j regions`` for compute times and the load; those of regions that join come behind, in the same way.

    Args:
        server: The global server.
        source: Computes the gradients of all local workers.
        queue: Virtual time.
        links: Network between regions and the global server, and its speed.
        compute_seconds: Draws the time of a batch for a local worker's next ticket.
        observe: Called after every push to the global server.
        regions: The number of regions at the start.
        region_workers: The number of local workers of each.
        local_seconds: The time of a message between a region's server and its workers.
        new_region: Makes a region at the given parameters.
    """

    def __init__(
        self,
        server: ParameterServer,
        source: GradientSource,
        queue: EventQueue,
        links: Links,
        compute_seconds: Speeds,
        observe: Callable[[], None],
        *,
        regions: int,
        region_workers: int,
        local_seconds: float,
        new_region: Callable[[torch.Tensor], RegionServer],
    ) -> None:
        self._in_flight = PushesInFlight()
        super().__init__(server, self._in_flight, queue, links, compute_seconds, observe)
        self.local_source = source
        self.num_regions = regions
        self.region_workers = region_workers
        self.local_seconds = local_seconds
        self.new_region = new_region
        self.regions: dict[int, RegionServer] = {}
        self._events |= {"local begin": self._local_begin, "local push": self._local_push}

    def _region(self, worker: int) -> int:
        """Return the number of the region that a worker of the global server is."""
        return worker % self.num_regions if worker < self.server.num_workers else worker

    def _local(self, region: int, worker: int) -> int:
        """Return the number of a region's own worker among all of them."""
        joined = max(0, region - self.server.num_workers + 1)
        return region % self.num_regions + self.num_regions * (self.region_workers * joined + worker)

    def _region_of(self, local: int) -> int:
        """Return the region of a number that `_local` has made."""
        joined = local // (self.num_regions * self.region_workers)
        return self.server.num_workers + joined - 1 if joined else local % self.num_regions

    @override
    def leave(self, worker: int) -> None:
        super().leave(worker)
        number = self._region(worker)
        if number in self.regions:
            self.regions[number].drop(worker)
            if all(self._region(other) != number for other in self._since):
                del self.regions[number]

    @override
    def _begin(self, reply: Reply) -> None:
        if reply.worker not in self._since:
            return  # it has left while the reply was on its way
        number = self._region(reply.worker)
        region = self.regions.get(number)
        if region is None or region.ended:
            region = self.regions[number] = self.new_region(reply.params)
        self._send_locally(number, region, region.grant(reply))

    def _send_locally(self, number: int, region: RegionServer, replies: Iterable[Reply]) -> None:
        for reply in replies:
            self.queue.at(self.queue.now + self.local_seconds, "local begin", (number, region, reply))

    def _local_begin(self, argument: tuple[int, RegionServer, Reply]) -> None:
        number, _, reply = argument
        worker = self._local(number, reply.worker)
        seconds = self.compute_seconds(worker) * reply.steps
        self.load.computing[worker] = self.load.computing.get(worker, 0.0) + seconds
        self.queue.at(self.queue.now + seconds + self.local_seconds, "local push", argument)

    def _local_push(self, argument: tuple[int, RegionServer, Reply]) -> None:
        number, region, reply = argument
        if not self._lives(argument):
            return
        source, computed = self.local_source, self._of_all(argument)
        if source.AHEAD:
            following = self.queue.next_of("local push", source.AHEAD)
            source.begin(computed, *(self._of_all(each) for each in following if self._lives(each)))
        push = source.compute(computed)
        replies, pushes = region.receive(replace(push, worker=reply.worker))
        self._send_locally(number, region, replies)
        for made in pushes:
            self._in_flight.pushes[made.worker, made.ticket] = made
            answered = replace(reply, worker=made.worker, ticket=made.ticket)
            self.queue.at(self.queue.now + self.links.push_seconds(made.worker), "arrive", answered)

    def _lives(self, argument: tuple[int, RegionServer, Reply]) -> bool:
        """Tell if the region of a local worker has not died, and the worker with it."""
        number, region, _ = argument
        return self.regions.get(number) is region

    def _of_all(self, argument: tuple[int, RegionServer, Reply]) -> Reply:
        """Return a reply to a local worker as one to the worker's number among those of all regions."""
        number, _, reply = argument
        return replace(reply, worker=self._local(number, reply.worker))

    @override
    def close(self) -> None:
        super().close()
        regions = dict(self.load.member)
        self.load.member = {worker: regions.get(self._region_of(worker), 0.0) for worker in self.load.computing}

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return what `Cluster.state_dict` does, without the regions: they are begun anew from it."""
        state = super().state_dict()
        state["queue"]["events"] = [event for event in state["queue"]["events"] if event[2] in KEPT_EVENTS]
        return {**state, "local_source": self.local_source.state_dict()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.local_source.load_state_dict(state["local_source"])
        self._free_at = self.queue.now
        self._send(self.server.start(list(self.server.members)))
