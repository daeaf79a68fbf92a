"""The worker object that `join` returns: iterating over it gives work, `push` sends the gradients."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

import torch

from ormo_rpc.data.own_loop import OwnLoopData
from ormo_rpc.errors import LoopMisused
from ormo_rpc.messages import Push, Reply
from ormo_rpc.options.imports import users_line
from ormo_rpc.own_loop.alone import AloneSource
from ormo_rpc.own_loop.elsewhere import WorkerSource
from ormo_rpc.own_loop.evaluation import EvaluateFunction, OwnFunction, number
from ormo_rpc.own_loop.job import OwnModel
from ormo_rpc.own_loop.roles import Role
from ormo_rpc.own_loop.run import Run, Source
from ormo_rpc.own_loop.serving import ServerSource
from ormo_rpc.own_loop.worker import OwnWorker
from ormo_rpc.seeding import seed_for, seeded
from ormo_rpc.server.validation import check_whole
from ormo_rpc.worker.heterogeneity import cpu_seconds

F = TypeVar("F", bound=EvaluateFunction)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """A ticket, for which the model now has parameters and buffers, and gradients of zero.

    Attributes:
        ticket: Its number, from 0 to ``total_tickets - 1``; after a failure another worker may get it again.
        stamp: The index of the parameters: gradients applied to them so far.
        epoch: The epoch that the ticket belongs to, by its number.
        seed: A number of the run's seed and the ticket alone, with which torch's, numpy's and Python's global generators have
            just been seeded.
        lr: The learning rate at that stamp.
        worker: The number of this worker.
    """

    ticket: int
    stamp: int
    epoch: int
    seed: int
    lr: float
    worker: int


@dataclass
class _Held:
    """The ticket that the loop's body works for.

    Attributes:
        reply: The reply that has the ticket.
        own: The worker that has put it into the model.
        began: `cpu_seconds` as the body began.
        pushed: The ticket is answered.
        following: The next reply with a ticket; None at the end.
    """

    reply: Reply
    own: OwnWorker
    began: float
    pushed: bool = False
    following: Reply | None = None


class JoinedWorker:
    """This process's part in a run; see `join`.

    Iterating over it gives one `Work` after another, each to be answered by one `push`. In the process of the server it serves
    to the end of the run, and gives none; the model then has the final parameters. Elsewhere it has those of the last ticket.

    Args:
        role: The part of this process.
        model: The script's model.
        lr: The script's learning rate; None for that of the configuration.
        run_dir: The run directory, as the script has it.
        words: The overrides that were typed.
        began: Time at which the run began, on the monotonic clock.

    Attributes:
        summary: The content of ``summary.json`` after the loop, in the process of the server; else None.
    """

    def __init__(
        self,
        role: Role,
        model: OwnModel,
        *,
        lr: Callable[[int], float] | None,
        run_dir: Path | None,
        words: Sequence[str],
        began: float,
    ) -> None:
        self._role = role
        self._model = model
        self._lr = lr
        self._run_dir = run_dir
        self._words = words
        self._began = began
        self._evaluate: OwnFunction | None = None
        self._source: Source | None = None
        self._replies: Generator[Reply, Push] | None = None
        self._held: _Held | None = None
        self._pid = os.getpid()
        if role.child is not None:
            role.child.joined_at = users_line()
        self.summary: dict[str, Any] | None = None

    @property
    def serves(self) -> bool:
        """True in the process of the server, which is the one to save or print results."""
        return self._role.serves

    @overload
    def evaluate_with(self, function: F, *, every: int | None = None, higher_is_better: Sequence[str] = ()) -> F: ...
    @overload
    def evaluate_with(
        self, function: None = None, *, every: int | None = None, higher_is_better: Sequence[str] = ()
    ) -> Callable[[F], F]: ...
    def evaluate_with(
        self, function: F | None = None, *, every: int | None = None, higher_is_better: Sequence[str] = ()
    ) -> F | Callable[[F], F]:
        """Register an evaluation, before the loop; also as a decorator.

        It is called in the process of the server, in a thread of its own where workers are other processes, with a copy of the
        model in eval mode that has the parameters and buffers of a moment, and without recording gradients. It returns the
        loss, or metrics by name. Where it fails, that is counted and logged, and training goes on.

        Args:
            function: The evaluation, a function of a model.
            every: Iterations between two evaluations; by default ``evaluate.every``.
            higher_is_better: All metrics that are better higher; by default those whose names have no word such as loss,
                error, perplexity, nll, mae or rmse.

        Raises:
            LoopMisused: it is called in or after the loop, or an argument is wrong.
        """
        if self._source is not None:
            raise LoopMisused(f"{users_line()}: evaluate_with() is called in or after the loop, expected before it")
        if every is not None and (type(every) is not int or every < 1):
            raise LoopMisused(f"{users_line()}: every: got {every!r} in evaluate_with(), expected a whole number >= 1")

        def register(function: F) -> F:
            if not callable(function):
                raise LoopMisused(
                    f"{users_line()}: got {type(function).__name__} in evaluate_with(), expected a function of the model"
                )
            self._evaluate = OwnFunction(function, every, tuple(higher_is_better))
            return function

        return register if function is None else register(function)

    def __iter__(self) -> Iterator[Work]:
        if self._source is not None:
            raise LoopMisused(f"{users_line()}: the loop begins a second time, expected one loop for each join()")
        _refuse_inference()
        self._model.refuse_changed()
        self._pid, role = os.getpid(), self._role
        if role.child is not None:
            role.child.joined_at = ""
        if self._evaluate is None and (role.config.keeps_best or role.config.evaluate.targets):
            raise LoopMisused(
                f"{users_line()}: nothing is evaluated, expected evaluate_with() before the loop with evaluate.targets, "
                "evaluate.patience or checkpoint.best"
            )
        run = Run(
            role=role,
            model=self._model,
            lr=self._lr,
            evaluate=self._evaluate,
            run_dir=self._run_dir,
            words=self._words,
            began=self._began,
        )
        source = AloneSource(run) if role.alone else ServerSource(run) if role.serves else WorkerSource(run)
        self._source = source
        return self._work(source)

    def push(self, loss: Any = None, metrics: Mapping[str, Any] | None = None, *, samples: int = 1) -> None:
        """Send the gradients that the passes of this ticket have left in the model, and wait for the next ticket.

        What has no gradient counts as zero, a sparse one is made dense, and several backward passes have added up.

        Args:
            loss: The loss of the ticket, a number or a tensor of one, for the records; None where it is not known.
            metrics: Further numbers for the records, by name, or a pair (sum, count) of a mean each.
            samples: The samples of the batch, for the records.

        Raises:
            LoopMisused: there is no ticket that it could be for, or something was changed that must not be.
            ServerLost: the server has not come back in time.
            WorkerBanned: the server takes no more from this worker.
        """
        held, source, replies = self._held, self._source, self._replies
        if held is None or source is None or replies is None:
            raise LoopMisused(f"{users_line()}: push() is called outside of the loop, expected once in each of its rounds")
        if held.pushed:
            raise LoopMisused(f"{users_line()}: push() is called again for ticket {held.reply.ticket}, expected once for each")
        _refuse_inference()
        if os.getpid() != self._pid:
            raise LoopMisused(f"{users_line()}: push() is called in a process that the script has forked, expected in its own")
        try:
            value = None if loss is None else number("the loss", loss)
            check_whole(samples, "samples", ValueError)
            if samples < 1:
                raise ValueError(f"samples: got {samples}, expected at least 1")
            push = held.own.finish(held.reply, loss=value, samples=samples, metrics=metrics or {})
        except LoopMisused:
            raise
        except (TypeError, ValueError) as error:
            raise LoopMisused(f"{users_line()}: {error}") from error
        held.pushed = True
        source.before_push(max(0.0, cpu_seconds() - held.began))  # 0 where another thread pushes
        try:
            held.following = replies.send(push)
        except StopIteration:
            held.following = None
        if self._role.child is not None:
            self._role.child.has_worked = True

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """Multiply a loss by the server's scale, for ``worker.scaled(loss).backward()`` with ``worker.autocast=fp16``.

        Without it the loss is returned as it is. The gradients that are pushed are divided by the scale; where they have
        overflowed, the server lowers it and issues the ticket again.

        Raises:
            LoopMisused: there is no ticket that it could be for.
        """
        if self._held is None:
            raise LoopMisused(f"{users_line()}: scaled() is called outside of the loop, expected in one of its rounds")
        return self._held.own.scaled(loss)

    def unscale(self) -> None:
        """Divide the gradients of this ticket by the server's scale now, which `push` then does not, to clip or to read them.

        As ``GradScaler.unscale_`` it has its place behind the last ``backward()`` of a round. Without ``worker.autocast=fp16``
        it changes nothing.

        Raises:
            LoopMisused: there is no ticket that it could be for, it is called again, or the gradients are not those of a scaled
                loss in float32.
        """
        if self._held is None or self._held.pushed:
            raise LoopMisused(
                f"{users_line()}: unscale() is called without a ticket to be pushed, expected between backward() and push()"
            )
        self._held.own.unscale()

    def _work(self, source: Source) -> Generator[Work]:
        """Give a `Work` for each reply, to the end of the run; then the model has memory of its own again."""
        config, data = self._role.config, self._role.config.dataset
        assert isinstance(data, OwnLoopData), "a loop of the user's own has it"
        seed, per_epoch = config.seed, data.tickets_per_epoch or config.train.max_iterations or 1
        replies = self._replies = source.replies()
        try:
            reply = next(replies, None)
            while reply is not None:
                assert reply.ticket is not None, "replies without a ticket end the loop"
                held = _Held(reply, source.worker, cpu_seconds())
                held.own.begin(reply)
                work = Work(
                    ticket=reply.ticket,
                    stamp=reply.stamp,
                    epoch=reply.ticket // per_epoch,
                    seed=seed_for(seed, "forward", reply.ticket),
                    lr=reply.lr,
                    worker=reply.worker,
                )
                self._held = held
                with seeded(seed, "forward", reply.ticket):
                    yield work
                self._held = None
                if not held.pushed:
                    raise LoopMisused(
                        f"{users_line()}: the loop goes on without push() for ticket {reply.ticket}, expected one in "
                        "each of its rounds; a batch that is to count for nothing is pushed without backward()"
                    )
                reply = held.following
        finally:
            self._held = self._replies = None
            if os.getpid() == self._pid:
                replies.close()
            else:  # a process that the script has forked ends: connections and files of the run are not its own to close
                _never_close(replies)
            self.summary = source.summary


def _refuse_inference() -> None:
    """Refuse to make tensors that no gradient can be computed with."""
    if torch.is_inference_mode_enabled():
        raise LoopMisused(
            f"{users_line()}: the loop is in torch.inference_mode(), where nothing has gradients, expected to be outside of it"
        )


def _never_close(generator: Generator[Any, Any]) -> None:
    """Hold a reference beyond the end of the interpreter, which would close the generator."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(generator))
