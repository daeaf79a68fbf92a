"""A virtual cluster: a real `ParameterServer`, a real gradient source, and workers that exist as events only.

The life cycle of a ticket: the reply crosses the worker's link, the worker computes, the push crosses the link back, waits in
the server's queue, and is served; then the replies that are due are sent. A gradient is computed when its push is served, at
the snapshot in its reply, so a thousand workers need no memory but that of the snapshots in flight. A source that computes on
another device begins the next one meanwhile: it is a function of its reply, so that nothing depends on when that is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Protocol

import torch

from ormo_rpc.messages import Push, Reply
from ormo_rpc.runtimes.simulator.clock import EventQueue
from ormo_rpc.runtimes.simulator.machines import Machines
from ormo_rpc.server.parameter_server import ParameterServer


class GradientSource(Protocol):
    """Computes pushes: a `Worker`, or a cheaper synthetic source.

    Attributes:
        AHEAD: The number of pushes that it can begin before they are asked for; 0 where it computes them at once.
    """

    AHEAD: ClassVar[int]

    def begin(self, *replies: Reply) -> None:
        """Start to compute pushes without waiting for them, in the order in which they will be asked for.

        It changes no later result. What was begun before and is not among them may never be asked for.
        """
        ...

    def compute(self, reply: Reply) -> Push:
        """Compute the push for a reply, as the server receives it; the next call of any method may overwrite its tensors."""
        ...

    def forget(self, worker: int | None = None) -> None:
        """Reset the compression state of a worker, or of all workers."""
        ...

    def state_dict(self) -> dict[int, dict[str, Any]]:
        """Return the compression state of each worker."""
        ...

    def load_state_dict(self, state: Mapping[int, Mapping[str, Any]]) -> None:
        """Restore what `state_dict` returned."""
        ...


@dataclass(frozen=True, kw_only=True)
class Links:
    """The network and the server's speed; worker k takes entry k modulo the length of a sequence.

    Attributes:
        latency_seconds: One way, per worker.
        bandwidth: In bytes per second, per worker; empty for no limit.
        push_bytes: The size of a push.
        reply_bytes: The size of a reply.
        service_seconds: The time that the server takes for a push.
    """

    latency_seconds: Sequence[float] = (0.0,)
    bandwidth: Sequence[float] = ()
    push_bytes: int = 0
    reply_bytes: int = 0
    service_seconds: float = 0.0

    def push_seconds(self, worker: int) -> float:
        """Return the transfer time of a worker's push."""
        return self._seconds(worker, self.push_bytes)

    def reply_seconds(self, worker: int) -> float:
        """Return the transfer time of a reply to a worker."""
        return self._seconds(worker, self.reply_bytes)

    def _seconds(self, worker: int, message_bytes: int) -> float:
        transfer = message_bytes / self.bandwidth[worker % len(self.bandwidth)] if self.bandwidth else 0.0
        return self.latency_seconds[worker % len(self.latency_seconds)] + transfer


class Speeds:
    """Compute times, drawn from a random generator for each worker.

    Args:
        seconds: ``seconds(worker, generator)`` draws the next time.
        generator: ``generator(worker)`` makes the random generator of a worker, in its first state.
    """

    def __init__(self, seconds: Callable[[int, torch.Generator], float], generator: Callable[[int], torch.Generator]) -> None:
        self._seconds = seconds
        self._generator = generator
        self.generators: dict[int, torch.Generator] = {}

    def __call__(self, worker: int) -> float:
        """Draw the compute time of a batch for the next ticket of a worker."""
        if worker not in self.generators:
            self.generators[worker] = self._generator(worker)
        return self._seconds(worker, self.generators[worker])

    def state_dict(self) -> dict[int, torch.Tensor]:
        """Return the state of each worker's random generator."""
        return {worker: generator.get_state() for worker, generator in self.generators.items()}

    def load_state_dict(self, state: dict[int, torch.Tensor]) -> None:
        """Restore what `state_dict` returned."""
        for worker, generator_state in state.items():
            self.generators[worker] = self._generator(worker)
            self.generators[worker].set_state(generator_state)


@dataclass
class Load:
    """The load of workers and server, in virtual seconds.

    Attributes:
        computing: Time computing, by worker.
        member: Time from joining to leaving or to the end, by worker.
        serving: Time that the server spent on pushes.
        queueing: Sum over the pushes of the time that they waited for the server.
    """

    computing: dict[int, float] = field(default_factory=dict[int, float])
    member: dict[int, float] = field(default_factory=dict[int, float])
    serving: float = 0.0
    queueing: float = 0.0


class Cluster:
    """A server and its virtual workers on an event queue.

    Args:
        server: The server, whose clock is that of the queue.
        source: Computes the gradients of all workers.
        queue: Virtual time.
        links: Network and server speed.
        compute_seconds: Draws the time of a batch for a worker's next ticket.
        observe: Called after every push, once its replies are scheduled.
        processes: The number of machines at the start, where workers share them (`Machines`).
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
        self.machines = Machines(processes, server.num_workers)
        server.on_cancel = self._cancel
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
        """Process the next event; return False when there is none."""
        event = self.queue.pop()
        if event is None:
            return False
        name, argument = event
        self._events[name](argument)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the server's state, of types that `torch.load` reads: queue, generators, load."""
        queue = self.queue.state_dict()
        events = [(*when, _saved(argument)) for *when, argument in queue["events"]]
        return {
            "queue": {**queue, "events": events},
            "speeds": self.compute_seconds.state_dict(),
            "load": asdict(self.load),
            "since": dict(self._since),
            "free_at": self._free_at,
            "work": self.machines.state_dict(),
            "source": self.source.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; the server must have loaded its state of the same moment."""
        queue = state["queue"]
        events = [(*when, _restored(argument)) for *when, argument in queue["events"]]
        self.queue.load_state_dict({**queue, "events": events})
        self.compute_seconds.load_state_dict(state["speeds"])
        self.load = Load(**state["load"])
        self._since, self._free_at = dict(state["since"]), state["free_at"]
        self.machines.load_state_dict(state, self._since)
        self.source.load_state_dict(state.get("source", {}))  # older checkpoints do not have it

    def start(self) -> None:
        """Start the server with all its workers."""
        self._since = dict.fromkeys(range(self.server.num_workers), 0.0)
        self._send(self.server.start())

    def join(self, worker: int) -> None:
        """Let a worker join; what an earlier worker of its number still had in flight is dropped."""
        self._drop({worker})
        self.source.forget(worker)
        self._since[worker] = self.queue.now
        self._send(self.server.join(worker))

    def leave(self, worker: int) -> None:
        """Let a worker leave; its work in flight is lost, and its machine goes on with what waits for it."""
        if worker in self._since:
            if self._stop(worker):
                self._drop({worker})  # it will never be sent
                self._move_up(worker)
            self._count_membership(worker)
            self.source.forget(worker)
            self._send(self.server.leave(worker))

    def finish(self, _: None = None) -> None:
        """Issue no further ticket."""
        self._send(self.server.finish())

    def close(self) -> None:
        """Count the time of the workers that stayed to the end, and what they have computed by then."""
        for worker in list(self._since):
            self._stop(worker)
            self._count_membership(worker)

    def _send(self, replies: Iterable[Reply]) -> None:
        for reply in replies:
            if reply.ticket is not None:
                self.queue.at(self.queue.now + self.links.reply_seconds(reply.worker), "begin", reply)

    def _begin(self, reply: Reply) -> None:
        """Begin to compute: the reply has reached its worker, if that has not left meanwhile."""
        if reply.worker not in self._since:
            return
        seconds = self.compute_seconds(reply.worker) * reply.steps
        self.load.computing[reply.worker] = self.load.computing.get(reply.worker, 0.0) + seconds
        self._compute(reply, seconds)

    def _compute(self, reply: Reply, seconds: float) -> None:
        """Compute for a reply as soon as the machine is free, and send the push."""
        end = self.machines.compute(reply.worker, seconds, self.queue.now)
        self.queue.at(end + self.links.push_seconds(reply.worker), "arrive", reply)

    def _arrive(self, reply: Reply) -> None:
        """Queue the push that has reached the server behind those before it."""
        begin = max(self.queue.now, self._free_at)
        self._free_at = begin + self.links.service_seconds
        self.load.queueing += begin - self.queue.now
        self.load.serving += self.links.service_seconds
        self.queue.at(self._free_at, "serve", reply)

    def _serve(self, reply: Reply) -> None:
        if not self._connected(reply):
            return
        if self.source.AHEAD:
            self.source.begin(reply, *self._following(self.source.AHEAD))
        push = self.source.compute(reply)
        self._send(self.server.receive(push))
        self.observe()

    def _following(self, count: int) -> list[Reply]:
        """Return the replies whose pushes are served next, if nothing comes between: at the server, or on their way to it."""
        found = self.queue.next_of("serve", count)
        if len(found) < count:
            found += self.queue.next_of("arrive", count - len(found))
        return [reply for reply in found if self._connected(reply)]

    def _connected(self, reply: Reply) -> bool:
        """Tell if the worker that computes for a reply is still the one that got it, and so its connection is there."""
        return self._since.get(reply.worker, float("inf")) <= self.queue.now and reply.worker in self.server.members

    def _cancel(self, workers: Collection[int]) -> None:
        """Drop what these workers compute or have under way; they have computed until now.

        A push that waits for the server has taken its time there.
        """
        self._drop(workers)
        for worker in workers:
            self._stop(worker)

    def _stop(self, worker: int) -> float:
        """Stop a worker's computation, which counts up to now only; return the seconds that were left."""
        left = self.machines.stop(worker, self.queue.now)
        if left:
            self.load.computing[worker] = self.load.computing.get(worker, 0.0) - left
        return left

    def _move_up(self, worker: int) -> None:
        """Compute what waits for the machine of a worker, which may be free now."""
        waiting = self.machines.stop_waiting(worker, self.queue.now)
        replies = {reply.worker: reply for reply in self.queue.next_of("arrive") if reply.worker in waiting}
        self._drop(waiting)
        for other, seconds in waiting.items():
            self._compute(replies[other], seconds)

    def _drop(self, workers: Collection[int]) -> None:
        """Remove all that these workers have in flight."""
        self.queue.drop(lambda _, argument: isinstance(argument, Reply) and argument.worker in workers)

    def _count_membership(self, worker: int) -> None:
        seconds = self.queue.now - self._since.pop(worker)
        self.load.member[worker] = self.load.member.get(worker, 0.0) + seconds


def _saved(argument: Any) -> Any:
    """Return an event's argument as plain values and tensors."""
    if not isinstance(argument, Reply):
        return argument
    return {field.name: getattr(argument, field.name) for field in fields(argument)}


def _restored(saved: Any) -> Any:
    return Reply(**saved) if isinstance(saved, dict) else saved
