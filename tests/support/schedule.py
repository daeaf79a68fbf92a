"""Schedules: sequences of pushes, joins and leaves, and a driver that takes a server through one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Generic, Literal, Protocol, TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor

from ormo_rpc.algorithms.base import Algorithm, LocalWork
from ormo_rpc.messages import Push, Reply
from ormo_rpc.server.parameter_server import ParameterServer


class Server(Protocol):
    """The methods that a schedule calls: `ormo_rpc.ParameterServer`, or a substitute."""

    def start(self) -> list[Reply]: ...
    def receive(self, push: Push) -> list[Reply]: ...
    def join(self, worker: int) -> list[Reply]: ...
    def leave(self, worker: int) -> list[Reply]: ...


S = TypeVar("S", bound=Server)

Action = Literal["push", "join", "leave"]
Schedule = list[tuple[Action, int]]
"""Actions, each with a number that picks the reply or worker, modulo how many there are."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One call of the server and the replies that it made due."""

    kind: Literal["start", "push", "join", "leave"]
    worker: int
    push: Push | None = None
    replies: tuple[Reply, ...]


@dataclass
class Run(Generic[S]):
    """A server, the gradients of its workers, and everything that happened so far.

    Attributes:
        server: The server.
        gradient: The gradient of a reply, shape (D,): a pure function.
        num_workers: The number of workers at the start.
        history: Every call so far.
        outstanding: The replies that wait for their push by worker and ticket, oldest first.
        members: The present workers; `gone`: those that left, in order; `stopped`: those that were told to stop.
        issued: The parameters of every reply, and a copy made when it was issued.
    """

    server: S
    gradient: Callable[[Reply], Tensor]
    num_workers: int
    history: list[Step] = field(default_factory=list[Step])
    outstanding: dict[tuple[int, int], Reply] = field(default_factory=dict[tuple[int, int], Reply])
    members: set[int] = field(default_factory=set[int])
    gone: list[int] = field(default_factory=list[int])
    stopped: set[int] = field(default_factory=set[int])
    issued: list[tuple[Tensor, Tensor]] = field(default_factory=list[tuple[Tensor, Tensor]])

    def __post_init__(self) -> None:
        if isinstance(self.server, ParameterServer):
            self.server.on_cancel = self.drop

    def start(self) -> Run[S]:
        """Start the server."""
        self.members = set(range(self.num_workers))
        self._note("start", -1, None, self.server.start())
        return self

    def push(self, reply: Reply) -> Step:
        """Answer one of the outstanding replies."""
        push = answer(reply, self.gradient(reply))
        replies = self.server.receive(push)
        del self.outstanding[reply.worker, push.ticket]
        return self._note("push", reply.worker, push, replies)

    def join(self, worker: int) -> Step:
        """Let a worker join."""
        replies = self.server.join(worker)
        self.members.add(worker)
        self.gone = [other for other in self.gone if other != worker]
        return self._note("join", worker, None, replies)

    def leave(self, worker: int) -> Step:
        """Let a worker leave, and drop its outstanding replies."""
        replies = self.server.leave(worker)
        self.members.remove(worker)
        self.gone.append(worker)
        self.stopped.discard(worker)
        self.drop([worker])
        return self._note("leave", worker, None, replies)

    def drop(self, workers: Collection[int]) -> None:
        """Drop the outstanding replies of workers whose tickets were taken back."""
        for key in [key for key in self.outstanding if key[0] in workers]:
            del self.outstanding[key]

    def restart(self) -> Step:
        """Start a new incarnation with the workers of the start; all outstanding replies are void."""
        self.members, self.gone = set(range(self.num_workers)), []
        self.stopped.clear()
        self.outstanding.clear()
        return self._note("start", -1, None, self.server.start())

    def steps(self, schedule: Schedule) -> Iterable[Step]:
        """Follow a schedule, then answer the oldest reply first, until none is outstanding.

        The last worker never leaves. The number of a "join" picks a worker that left or a new one.
        """
        for action, number in schedule:
            if action == "push" and self.outstanding:
                yield self.push(list(self.outstanding.values())[number % len(self.outstanding)])
            elif action == "join":
                new = 1 + max(*self.members, *self.gone, -1)
                yield self.join([*self.gone, new][number % (1 + len(self.gone))])
            elif action == "leave" and len(self.members) > 1:
                yield self.leave(sorted(self.members)[number % len(self.members)])
        while self.outstanding:
            yield self.push(next(iter(self.outstanding.values())))

    def finish(self, schedule: Schedule | None = None) -> Run[S]:
        """Follow a schedule to the end of the run."""
        for _ in self.steps(schedule or []):
            pass
        return self

    def follow(self, schedule: Schedule) -> Run[S]:
        """Follow a schedule, and stop where it stops."""
        for _, _ in zip(schedule, self.steps(schedule), strict=False):
            pass
        return self

    def fork(self, server: S) -> Run[S]:
        """Copy this run for another server, which must be in the same state."""
        return Run(
            server=server,
            gradient=self.gradient,
            num_workers=self.num_workers,
            history=list(self.history),
            outstanding=dict(self.outstanding),
            members=set(self.members),
            gone=list(self.gone),
            stopped=set(self.stopped),
        )

    @property
    def pushes(self) -> list[Push]:
        """Return all pushes so far."""
        return [step.push for step in self.history if step.push is not None]

    def _note(
        self, kind: Literal["start", "push", "join", "leave"], worker: int, push: Push | None, replies: list[Reply]
    ) -> Step:
        step = Step(kind=kind, worker=worker, push=push, replies=tuple(replies))
        self.history.append(step)
        for reply in replies:
            self.issued.append((reply.params, reply.params.clone()))
            if reply.ticket is None:
                self.stopped.add(reply.worker)
            else:
                assert (reply.worker, reply.ticket) not in self.outstanding, "a ticket was handed twice to one worker"
                self.outstanding[reply.worker, reply.ticket] = reply
        return step


def answer(reply: Reply, grad: Tensor) -> Push:
    """Return the push that a worker sends for a reply."""
    assert reply.ticket is not None, "the worker has stopped"
    return Push(
        worker=reply.worker,
        ticket=reply.ticket,
        stamp=reply.stamp,
        grad=grad,
        incarnation=reply.incarnation,
        loss_scale=reply.loss_scale,
    )


def schedules(*, changes: bool = False, max_size: int = 30) -> st.SearchStrategy[Schedule]:
    """Draw schedules; with ``changes``, workers join and leave too."""
    actions: list[Action] = ["push", "push", "push", "push", "join", "leave"] if changes else ["push"]
    return st.lists(st.tuples(st.sampled_from(actions), st.integers(0, 99)), max_size=max_size)


def normal(dimension: int, seed: int, ticket: int) -> Tensor:
    """Return the gradient of a ticket in `noise`, shape (D,), float64."""
    generator = torch.Generator().manual_seed(100_000 * seed + ticket)
    return torch.randn(dimension, generator=generator, dtype=torch.float64)


def noise(dimension: int, seed: int = 0) -> Callable[[Reply], Tensor]:
    """Return normally distributed gradients that depend on the ticket alone."""

    def gradient(reply: Reply) -> Tensor:
        assert reply.ticket is not None, "the worker has stopped"
        return normal(dimension, seed, reply.ticket)

    return gradient


def pushed(algorithm: Algorithm, gradient_at: Callable[[Tensor], Tensor]) -> Callable[[Reply], Tensor]:
    """Return the pushes of an algorithm's workers where every batch has the gradient ``gradient_at(params)``."""

    def gradient(params: Tensor, step: int, into: Tensor) -> None:  # noqa: ARG001 - all batches are the same
        into.copy_(gradient_at(params))

    def push(reply: Reply) -> Tensor:
        dimension = algorithm.params.numel()
        result = torch.zeros(algorithm.VECTORS_PUSHED * dimension, dtype=algorithm.params.dtype)
        work = LocalWork(
            sent=reply.params,
            dimension=dimension,
            lr=reply.lr,
            momentum=algorithm.momentum,
            steps=reply.steps,
            gradient=gradient,
        )
        algorithm.local(work, result)
        return result

    return push


class Quadratic:
    """The loss ``1/2 (w - target)' A (w - target)``, its curvatures spread evenly in the logarithm from ``smallest`` to 1.

    Args:
        dimension: D.
        smallest: The smallest curvature; the condition number is its inverse.
        seed: Of the axes and the target.
    """

    def __init__(self, dimension: int, *, smallest: float, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        axes, _ = torch.linalg.qr(torch.randn(dimension, dimension, generator=generator, dtype=torch.float64))
        curvature = torch.logspace(float(torch.tensor(smallest).log10()), 0, dimension, dtype=torch.float64)
        self.matrix = axes @ torch.diag(curvature) @ axes.T
        self.target = torch.randn(dimension, generator=generator, dtype=torch.float64)

    def gradient(self, reply: Reply) -> Tensor:
        """Return the exact gradient at the parameters of a reply."""
        return self.gradient_at(reply.params)

    def gradient_at(self, params: Tensor) -> Tensor:
        """Return the exact gradient at any parameters."""
        return self.matrix @ (params - self.target)

    def distance(self, params: Tensor) -> float:
        """Return the Euclidean distance to the minimum."""
        return float((params - self.target).norm())
