"""A virtual cluster: one real `ParameterServer`, one real gradient source, and workers that exist as events only.

The journey of a ticket: the reply travels over the worker's link, the worker computes, the push travels back, waits in the
server's queue, and is served; then the replies that are due leave. A gradient is computed when its push is served, at the
snapshot that its reply carried, so a thousand workers need no memory but that of the snapshots that somebody still holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol

import torch

from ormo_rpc.errors import NonFiniteGradient
from ormo_rpc.messages import Push, Reply
from ormo_rpc.runtimes.simulator.clock import EventQueue
from ormo_rpc.server.parameter_server import ParameterServer


class GradientSource(Protocol):
    """What answers replies; a `Worker`, or something cheaper."""

    def compute(self, reply: Reply) -> Push:
        """The push that answers a reply, as the server sees it; its tensors are used before the next call."""
        ...

    def forget(self, worker: int | None = None) -> None:
        """A worker (None: each of them) begins anew: what is kept of it is gone."""
        ...

    def state_dict(self) -> dict[int, dict[str, Any]]:
        """What is kept of each worker between its pushes."""
        ...

    def load_state_dict(self, state: Mapping[int, Mapping[str, Any]]) -> None:
        """Take over what `state_dict` returned."""
        ...


@dataclass(frozen=True, kw_only=True)
class Links:
    """The network and the server's speed; worker k takes entry k modulo the length of a sequence.

    Attributes:
        latency_seconds: One way, per worker.
        bandwidth: In bytes per second, per worker; empty for no limit.
        push_bytes: The size of a push.
        reply_bytes: The size of a reply.
        service_seconds: How long the server takes for a push.
    """

    latency_seconds: Sequence[float] = (0.0,)
    bandwidth: Sequence[float] = ()
    push_bytes: int = 0
    reply_bytes: int = 0
    service_seconds: float = 0.0

    def push_seconds(self, worker: int) -> float:
        """How long a worker's push is on its way."""
        return self._seconds(worker, self.push_bytes)

    def reply_seconds(self, worker: int) -> float:
        """How long a reply to a worker is on its way."""
        return self._seconds(worker, self.reply_bytes)

    def _seconds(self, worker: int, message_bytes: int) -> float:
        transfer = message_bytes / self.bandwidth[worker % len(self.bandwidth)] if self.bandwidth else 0.0
        return self.latency_seconds[worker % len(self.latency_seconds)] + transfer


class Speeds:
    """Draws how long each worker's next ticket takes, from a source of chance of its own.

    Args:
        seconds: ``seconds(worker, generator)`` draws the next time.
        generator: ``generator(worker)`` is a worker's source of chance at its start.
    """

    def __init__(self, seconds: Callable[[int, torch.Generator], float], generator: Callable[[int], torch.Generator]) -> None:
        self._seconds = seconds
        self._generator = generator
        self.generators: dict[int, torch.Generator] = {}

    def __call__(self, worker: int) -> float:
        """How long a worker's next ticket takes."""
        if worker not in self.generators:
            self.generators[worker] = self._generator(worker)
        return self._seconds(worker, self.generators[worker])

    def state_dict(self) -> dict[int, torch.Tensor]:
        """Where each source of chance is."""
        return {worker: generator.get_state() for worker, generator in self.generators.items()}

    def load_state_dict(self, state: dict[int, torch.Tensor]) -> None:
        """Take over what `state_dict` returned."""
        for worker, where in state.items():
            self.generators[worker] = self._generator(worker)
            self.generators[worker].set_state(where)


@dataclass
class Load:
    """How busy everybody was, in virtual seconds.

    Attributes:
        computing: By worker.
        member: By worker, from joining to leaving or to the end.
        serving: The server's time for pushes.
        queueing: Sum over the pushes of the time that they waited for the server.
    """

    computing: dict[int, float] = field(default_factory=dict[int, float])
    member: dict[int, float] = field(default_factory=dict[int, float])
    serving: float = 0.0
    queueing: float = 0.0


class Cluster:
    """Runs a server and its virtual workers on an event queue.

    Args:
        server: The server; its clock should be that of the queue.
        source: Computes all gradients.
        queue: Virtual time.
        links: Network and server speed.
        compute_seconds: Draws how long a worker's next ticket takes.
        observe: Called after every push that was served, when the replies that it made due are on their way.
        processes: How many machines there are, if workers share them: worker k computes on machine k modulo that number, which
            computes for one worker at a time.
    """

    def __init__(
        self,
        server: ParameterServer,
        source: GradientSource,
        queue: EventQueue,
        links: Links,
        compute_seconds: Speeds,
        observe: Callable[[], None],
        processes: int | None = None,
    ) -> None:
        self.server = server
        self.source = source
        self.queue = queue
        self.links = links
        self.compute_seconds = compute_seconds
        self.observe = observe
        self.processes = processes
        self._computing_until: dict[int, float] = {}
        """When each machine is free, where several workers share it."""
        self.load = Load()
        self._since: dict[int, float] = {}
        self._free_at = 0.0
        self._events: dict[str, Callable[[Any], None]] = {
            "join": self.join,
            "leave": self.leave,
            "finish": self.finish,
            "begin": self._begin,
            "arrive": self._arrive,
            "serve": self._serve,
        }

    def step(self) -> bool:
        """Let the next event happen; False when there is none."""
        event = self.queue.pop()
        if event is None:
            return False
        name, argument = event
        self._events[name](argument)
        return True

    def state_dict(self) -> dict[str, Any]:
        """All that is not the server's: time, what is under way, sources of chance, loads; `torch.load` reads it."""
        queue = self.queue.state_dict()
        events = [(*when, _saved(argument)) for *when, argument in queue["events"]]
        return {
            "queue": {**queue, "events": events},
            "speeds": self.compute_seconds.state_dict(),
            "load": asdict(self.load),
            "since": dict(self._since),
            "free_at": self._free_at,
            "computing_until": dict(self._computing_until),
            "source": self.source.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned, with a server that has loaded its state of that moment."""
        queue = state["queue"]
        events = [(*when, _restored(argument)) for *when, argument in queue["events"]]
        self.queue.load_state_dict({**queue, "events": events})
        self.compute_seconds.load_state_dict(state["speeds"])
        self.load = Load(**state["load"])
        self._since, self._free_at = dict(state["since"]), state["free_at"]
        # Older checkpoints do not have these two.
        self._computing_until = dict(state.get("computing_until", {}))
        self.source.load_state_dict(state.get("source", {}))

    def start(self) -> None:
        """Hand out the first tickets."""
        self._since = dict.fromkeys(range(self.server.num_workers), 0.0)
        self._send(self.server.start())

    def join(self, worker: int) -> None:
        """A worker comes; if one of its number was here before, what that one still had under way is lost at last."""
        self.queue.drop(lambda argument: isinstance(argument, Reply) and argument.worker == worker)
        self.source.forget(worker)
        self._since[worker] = self.queue.now
        self._send(self.server.join(worker))

    def leave(self, worker: int) -> None:
        """A worker is gone, and whatever it was at is lost."""
        if worker in self._since:
            self._count_membership(worker)
            self.source.forget(worker)
            self._send(self.server.leave(worker))

    def finish(self, _: None = None) -> None:
        """Hand out no further ticket."""
        self._send(self.server.finish())

    def close(self) -> None:
        """Count the time of those who stayed to the end."""
        for worker in list(self._since):
            self._count_membership(worker)

    def _send(self, replies: Iterable[Reply]) -> None:
        for reply in replies:
            if reply.ticket is not None:
                self.queue.at(self.queue.now + self.links.reply_seconds(reply.worker), "begin", reply)

    def _begin(self, reply: Reply) -> None:
        """The reply has reached its worker."""
        seconds = self.compute_seconds(reply.worker)
        begin = self.queue.now
        if self.processes is not None:
            machine = reply.worker % self.processes
            begin = max(begin, self._computing_until.get(machine, 0.0))
            self._computing_until[machine] = begin + seconds
        if reply.worker in self._since:
            self.load.computing[reply.worker] = self.load.computing.get(reply.worker, 0.0) + seconds
        self.queue.at(begin + seconds + self.links.push_seconds(reply.worker), "arrive", reply)

    def _arrive(self, reply: Reply) -> None:
        """The push has reached the server, and waits until those before it are served."""
        begin = max(self.queue.now, self._free_at)
        self._free_at = begin + self.links.service_seconds
        self.load.queueing += begin - self.queue.now
        self.load.serving += self.links.service_seconds
        self.queue.at(self._free_at, "serve", reply)

    def _serve(self, reply: Reply) -> None:
        if self._since.get(reply.worker, float("inf")) > self.queue.now or reply.worker not in self.server.members:
            return  # it left in the meantime, and its connection with it
        push = self.source.compute(reply)
        try:
            replies = self.server.receive(push)
        except NonFiniteGradient:
            replies = self.server.reject(push)
        self._send(replies)
        self.observe()

    def _count_membership(self, worker: int) -> None:
        seconds = self.queue.now - self._since.pop(worker)
        self.load.member[worker] = self.load.member.get(worker, 0.0) + seconds


def _saved(argument: Any) -> Any:
    """An event's argument in plain values and tensors."""
    if not isinstance(argument, Reply):
        return argument
    return {field.name: getattr(argument, field.name) for field in fields(argument)}


def _restored(saved: Any) -> Any:
    return Reply(**saved) if isinstance(saved, dict) else saved
