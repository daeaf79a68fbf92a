"""The contract of server algorithms: tensors in, tensors out; no lock, clock or network.

An algorithm is one file: a registered dataclass that derives from `Algorithm`, with its options as fields. On the server, for
every push and in this order, `Algorithm.accepts`, `Algorithm.learning_rate` and `Algorithm.step` are called, then
`Algorithm.held`, and `Algorithm.outgoing` for every worker that is answered; between them nothing else touches the algorithm.
On the worker `Algorithm.local` makes the push from what was sent. An algorithm never asks which scheduler it runs under.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch

from ormo_rpc.algorithms.groups import uniform
from ormo_rpc.kernels.kernel import Kernel
from ormo_rpc.options import Part

V = TypeVar("V", "torch.Tensor", int, float)


@dataclass(frozen=True, kw_only=True, slots=True)
class PushContext:
    """The place of a gradient in the run, at the moment when the server receives it.

    Attributes:
        worker: The worker that computed it.
        ticket: The unit of work.
        iteration: ``t``, the number of gradients applied before it.
        stamp: ``i``, the index of the parameters at which it was taken.
        bucket: ``b(i)``, the bucket of that index.
        newest_bucket: The largest bucket handed out to anybody so far.
        concurrency: ``K``, the number of gradients in flight at this moment.
        lr: ``eta``, the scheduled learning rate of iteration ``t``.
        sent_lr: The scheduled learning rate that was sent with the ticket, that of iteration ``i`` when it was handed out.
        version: The algorithm's `Algorithm.version` when the ticket was handed out.
        sent: The vectors sent with the ticket, read-only; None only in a server that was loaded and not started.
    """

    worker: int
    ticket: int
    iteration: int
    stamp: int
    bucket: int
    newest_bucket: int
    concurrency: int
    lr: float
    sent_lr: float = 0.0
    version: int = 0
    sent: torch.Tensor | None = None

    @property
    def delay(self) -> int:
        """``tau = t - i``."""
        return self.iteration - self.stamp


@dataclass(frozen=True, kw_only=True, slots=True)
class PullContext:
    """The place of a reply in the run, at the moment when the server makes it.

    Attributes:
        worker: The worker that is answered.
        concurrency: ``K`` at this moment.
        lr: ``eta``, the scheduled learning rate of the next iteration.
        bucket: ``b``, the bucket of the index that goes with the parameters.
    """

    worker: int
    concurrency: int
    lr: float
    bucket: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalWork:
    """One ticket on its worker.

    Attributes:
        sent: The result of `Algorithm.outgoing`, one or more vectors of D; read-only.
        dimension: D.
        lr: The learning rate when the ticket was handed out.
        momentum: ``beta``.
        steps: H, the number of batches in the ticket.
        gradient: ``gradient(params, step, into)`` writes the gradient of the ticket's batch number ``step`` (0 to H - 1) at the
            parameters ``params``, shape (D,), into ``into``, shape (D,).
    """

    sent: torch.Tensor
    dimension: int
    lr: float
    momentum: float
    steps: int
    gradient: Callable[[torch.Tensor, int, torch.Tensor], None]


@dataclass(kw_only=True)
class Algorithm(Part, ABC):
    """A server algorithm: how a gradient that was taken at stamp ``i`` changes the parameters at iteration ``t``.

    The fields of the dataclass are its options; its running state is set by `init`, which only the server calls. A worker has
    the same object without that state, for `local`.

    Attributes:
        params: ``w``, shape (D,).
        momentum: ``beta``, in [0, 1); an algorithm without momentum does not read it.
        kernel: Makes new parameters and copies; chosen by the server's builder.
        groups: Weight decay and learning-rate factor of each range of the parameters, for an algorithm that `DECAYS_ITSELF`.
        shapes: The shapes of the tensors that lie contiguous in a vector of D, for an algorithm that works on each of them
            (see `tensors`); set by the server's builder after `init`, one of shape (D,) where it knows none.
        version: The number of changes of the parameters so far, for an algorithm that reads `PushContext.version`.
    """

    PATH = "algorithm"

    VECTORS_PUSHED: ClassVar[int] = 1
    """The number of vectors of D in a push, contiguous; an algorithm without local steps reads the first one only."""
    VECTORS_SENT: ClassVar[int] = 1
    """The largest number of vectors of D that `outgoing` returns."""
    READS_SENT: ClassVar[bool] = False
    """`step` reads `PushContext.sent`; the server then refuses a push whose reply it has lost, so that it is never None."""
    OUT_OF_PLACE: ClassVar[bool] = False
    """`step` replaces `params` by what `kernel` makes, and never writes to it: the server hands it out as it is and
    copies nothing, and the gradient comes in the dtype that it had on the wire, which the kernel reads too."""
    DECAYS_ITSELF: ClassVar[bool] = False
    """`step` applies the weight decay and the learning-rate factors of `groups`; otherwise a worker's gradient has both."""
    REFUSES_LR_FACTORS: ClassVar[str | None] = None
    """The reason why a factor to the gradient would not be one to the learning rate of the parameters; None where it is."""
    REFUSES_MEAN_LR: ClassVar[str | None] = None
    """The reason why the learning rate must not be divided by the number of workers as well; None where it may."""
    FRESH: ClassVar[bool] = False
    """It applies gradients that were taken at the present parameters (with regions: their region's) only, in rounds: a delay is
    the place within a round."""
    NEEDS_IMMEDIATE_REPLIES: ClassVar[str | None] = None
    """The reason why only a scheduler that is `Scheduler.IMMEDIATE` will do; None where any will."""
    NEEDS_NO_BARRIER: ClassVar[str | None] = None
    """The reason why a scheduler that is a `Scheduler.BARRIER` will not do; None where it will."""
    REFUSES_PREFETCH: ClassVar[str | None] = None
    """The reason why no process may hold several tickets; None where it may."""

    def init(self, params: torch.Tensor, momentum: float) -> None:
        """Set the state at iteration 0.

        Args:
            params: ``w_0``, shape (D,); the algorithm owns this very tensor, and updates or replaces it.
            momentum: ``beta``.
        """
        self.params = params
        self.momentum = momentum
        self.kernel = Kernel()
        self.groups = uniform(params.numel())
        self.shapes: Sequence[Sequence[int]] = (params.shape,)
        self.version = 0

    @property
    def whole_rounds(self) -> bool:
        """True if each step is with the gradients of all workers at the same parameters, whatever the scheduler is."""
        return False

    @property
    def steps(self) -> int:
        """H, the local steps of a worker for each ticket, each on a batch of its own."""
        return 1

    @property
    def workers_are_regions(self) -> bool:
        """True if each worker is a region, with a server and workers of its own; of algorithms of two levels alone."""
        return False

    def accepts(self, context: PushContext) -> bool:  # noqa: ARG002 - the common answer needs no look at it
        """Decide if the gradient is applied; the ticket of one that is not goes back into the queue."""
        return True

    def learning_rate(self, context: PushContext) -> float:
        """Return the learning rate of this gradient: the scheduled one, unless the algorithm adapts it to the delay."""
        return context.lr

    @abstractmethod
    def step(self, grad: torch.Tensor, lr: float, context: PushContext) -> None:
        """Apply one gradient, shape (D,), of the dtype of `params` (but see `OUT_OF_PLACE`), which is not modified."""

    def held(self) -> Collection[int]:
        """Return the workers that are not to be answered yet, whatever the scheduler releases; asked before every answer.

        Where no worker computes, although there is work, as all that wait are held, the server calls `flush`, and then nobody
        may be held: a round waits for no one who does not come. An algorithm that holds workers `NEEDS_IMMEDIATE_REPLIES`.
        """
        return ()

    @property
    def cancels(self) -> bool:
        """True if `cancelled` may return anybody: for simulated workers only, as a live one cannot be interrupted."""
        return False

    def cancelled(self) -> Collection[int]:
        """Return the workers whose tickets are void by now; asked after every push where the algorithm `cancels`.

        The server takes the tickets back, and answers these workers at once. One without a ticket is passed over.
        """
        return ()

    def flush(self, lr: float) -> None:
        """Apply the rest of an unfinished round: when all gradients of the run are in, or where `held` says more.

        Args:
            lr: The scheduled learning rate of the newest gradient.
        """

    def join(self, worker: int) -> None:
        """Note a worker that has joined, or is there at the start, before it gets a ticket; `held` may then name it."""

    def leave(self, worker: int) -> None:
        """Forget a worker that has left or was evicted, where the algorithm keeps something for each."""

    def outgoing(self, context: PullContext) -> torch.Tensor:  # noqa: ARG002 - most algorithms send everybody the same
        """Return the vectors to send to a worker, ``w`` for most algorithms; the server copies them where they might change.

        Where it is not `params` itself, its first D values are the parameters to work on, and more vectors of D may follow.
        """
        return self.params

    def local(self, work: LocalWork, push: torch.Tensor) -> None:
        """On the worker: write the push into ``push``, shape (VECTORS_PUSHED * D,); by default the gradient."""
        work.gradient(work.sent, 0, push)

    def state_dict(self) -> Mapping[str, torch.Tensor | int | float]:
        """Return everything but ``w`` that the recursion carries from one gradient to the next, live (not a copy).

        Each name is an attribute. What is kept for each worker is in a dictionary attribute, under the names
        ``attribute/worker`` (see `by_worker`).
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; dictionaries by worker are replaced."""
        for name, value in self.state_dict().items():
            if "/" in name:
                getattr(self, name.split("/")[0]).clear()
            elif isinstance(value, torch.Tensor):
                value.copy_(state[name])
            else:
                setattr(self, name, state[name])
        for name, value in state.items():
            attribute, _, worker = name.partition("/")
            if worker:
                own = value.to(self.params.device, copy=True) if isinstance(value, torch.Tensor) else value
                getattr(self, attribute)[int(worker)] = own

    @staticmethod
    def by_worker(attribute: str, kept: Mapping[int, V]) -> dict[str, V]:
        """Return the entries of `state_dict` for a dictionary attribute that holds a tensor or number for each worker.

        They keep the attribute's order, on which the rounding of a sum over it depends.
        """
        return {f"{attribute}/{worker}": value for worker, value in kept.items()}

    def tensors(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """Return the model's tensors in a vector of D, such as the parameters or a gradient, as views in their order."""
        parts = vector.split([math.prod(shape) for shape in self.shapes])
        return [part.view(tuple(shape)) for part, shape in zip(parts, self.shapes, strict=True)]

    def empty(self) -> torch.Tensor:
        """Return an uninitialised vector of D for new parameters, which nothing else shares."""
        return self.kernel.empty(self.params)

    def zeros(self) -> torch.Tensor:
        """Return a new vector of D zeros, of the parameters' dtype and device."""
        return torch.zeros_like(self.params)
