"""The state of a parameter server: everything that the future of a run depends on, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ormo_rpc.algorithms.base import Algorithm
from ormo_rpc.messages import Reply
from ormo_rpc.schedulers.base import Scheduler
from ormo_rpc.server.assignments import Assignments
from ormo_rpc.server.buckets import Buckets
from ormo_rpc.server.buffers import RunningBuffers
from ormo_rpc.server.events import Event
from ormo_rpc.server.validation import NormLimit

STATE_VERSION = 4
"""The format of `ServerState.state_dict`; another one is refused."""


class Status(Enum):
    """The status of a run."""

    running = "running"
    completed = "completed"
    """Every ticket is redeemed, or the run was asked to end early and did."""
    diverged = "diverged"
    """The parameters are not finite, or a ticket's gradient was not, from two workers."""
    stopped = "stopped"
    """Asked to end before its time; outstanding tickets were not waited for."""


@dataclass(slots=True)
class Member:
    """The newest settled push of a worker, as (ticket, stamp), and its newest reply unless one is pending."""

    answered: tuple[int, int] | None = None
    reply: Reply | None = None


class ServerState:
    """The state of a `ParameterServer`, which says what the arguments are."""

    def __init__(
        self,
        algorithm: Algorithm,
        scheduler: Scheduler,
        *,
        num_workers: int,
        lr: Callable[[int], float],
        total_tickets: int | None = None,
        min_workers: int = 1,
        norm_limit: NormLimit | None = None,
        buffers: RunningBuffers | None = None,
        record: Callable[[Event], None] = lambda _: None,
        clock: Callable[[], float] = lambda: 0.0,
        timer: Callable[[], float] = lambda: 0.0,
        sent_dtype: torch.dtype | None = None,
        pushed_dtype: torch.dtype | None = None,
        process_of: Callable[[int], int] = lambda worker: worker,
    ) -> None:
        self.algorithm = algorithm
        self.scheduler = scheduler
        self.num_workers = num_workers
        self.min_workers = min_workers
        self.norm_limit = norm_limit
        self.lr = lr
        self.buffers = buffers or RunningBuffers({}, {})
        self.record = record
        self.clock = clock
        self.timer = timer
        self.step_seconds = 0.0
        """Time in the algorithm's steps and in making vectors for replies, by the timer; no part of the state."""
        self.sent_dtype = sent_dtype
        self.pushed_dtype = pushed_dtype

        self.status = Status.running
        self.iteration = 0
        self.incarnation = 0
        self.buckets = Buckets()
        self.newest_bucket = 0
        self.assignments = Assignments(total_tickets, process_of)
        self.members: dict[int, Member] = {}
        self.blocked: list[int] = []
        """Workers that the scheduler holds back, in the order of asking."""
        self.idle: list[int] = []
        """Workers to be answered as soon as there is a ticket for them, or the run ends."""
        self.paused = False
        """There are fewer than ``min_workers`` members, and there were enough before."""
        self.started = False
        self.newest_snapshot: Tensor | None = None
        """Of the present iteration, if somebody has asked for it."""
        self.newest_rounded: Tensor | None = None
        """The same, rounded to ``sent_dtype``."""

    # ------------------------------------------------------------------------------------------------------------ state

    @property
    def params(self) -> Tensor:
        """``w``, shape (D,), as it stands: to be read only, and at once, as the next gradient may change or replace it."""
        return self.algorithm.params

    @property
    def concurrency(self) -> int:
        """K, the number of gradients in flight."""
        return max(1, len(self.members))

    @property
    def ended(self) -> bool:
        """No more gradient will be applied."""
        return self.status is not Status.running

    def snapshot(self) -> Tensor:
        """``w`` as it stands, shape (D,), in a vector that never changes; one serves all who ask at the same iteration.

        It is a copy, unless the algorithm replaces its parameters anyway.
        """
        if self.newest_snapshot is None:
            self.newest_snapshot = self.params if self.algorithm.OUT_OF_PLACE else self.algorithm.empty().copy_(self.params)
        return self.newest_snapshot

    def sent_snapshot(self) -> Tensor:
        """The same as it is handed out: rounded to ``sent_dtype``, where there is one."""
        if self.sent_dtype is None:
            return self.snapshot()
        if self.newest_rounded is None:
            self.newest_rounded = self.handed_out(self.params)
        return self.newest_rounded

    def handed_out(self, vectors: Tensor) -> Tensor:
        """A copy that never changes, of ``sent_dtype`` where there is one."""
        return self.algorithm.kernel.copy(vectors, self.sent_dtype)

    def reserve(self, snapshots: int) -> None:
        """Allocate, before the start, memory for this many snapshots at a time, the first one among them.

        A large vector takes tens of milliseconds to make, for which a step would hold the lock.
        """
        algorithm = self.algorithm
        algorithm.kernel.reserve(algorithm.params, snapshots)
        if algorithm.OUT_OF_PLACE:
            algorithm.params = algorithm.empty().copy_(algorithm.params)

    def forget_snapshots(self) -> None:
        """Drop the snapshots of the former parameters."""
        self.newest_snapshot = self.newest_rounded = None

    def state_dict(self, *, replies: bool = False) -> dict[str, Any]:
        """Everything that the future of the run depends on, as a private copy that `torch.load` reads with weights_only.

        Without the replies, call `ParameterServer.start` after `load_state_dict` to assign outstanding tickets anew, or resume
        with pushes for them, which an algorithm with `Algorithm.READS_SENT` refuses.

        Args:
            replies: Whether the newest reply of each worker is in it, with its parameters; one that is loaded with them goes on
                exactly as this one would.
        """
        kept = [member.reply for member in self.members.values() if member.reply is not None] if replies else []
        return {
            "replies": [{field.name: getattr(reply, field.name) for field in fields(reply)} for reply in kept],
            "paused": self.paused,
            "version": STATE_VERSION,
            "algorithm": self.algorithm.name,
            "scheduler": self.scheduler.name,
            "params": self.snapshot(),
            "algorithm_state": {k: v.clone() if isinstance(v, Tensor) else v for k, v in self.algorithm.state_dict().items()},
            "buffers": self.buffers.state_dict(),
            "status": self.status.value,
            "iteration": self.iteration,
            "incarnation": self.incarnation,
            "buckets": (self.buckets.current, self.buckets.room),
            "newest_bucket": self.newest_bucket,
            "assignments": self.assignments.state_dict(),
            "members": {worker: member.answered for worker, member in self.members.items()},
            "blocked": list(self.blocked),
            "idle": list(self.idle),
            "scheduler_state": self.scheduler.state_dict(),
            "scheduler_generator": self.scheduler.generator.get_state(),
        }

    @torch.no_grad()  # whoever made the state, later steps must not hang on its graph
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; the number of tickets stays the one that this server was built with.

        Raises:
            ValueError: it has more applied gradients than this server is to apply, or is of another format, algorithm,
                scheduler, dtype, shape or set of buffers; nothing is changed then.
        """
        mine = {
            "version": STATE_VERSION,
            "algorithm": self.algorithm.name,
            "scheduler": self.scheduler.name,
            "params": _layout({"params": self.params}),
            "buffers": _layout(self.buffers.state_dict()),
            "algorithm_state": _layout(self.algorithm.state_dict()),
        }
        theirs = {
            **{key: state.get(key) for key in ("version", "algorithm", "scheduler")},
            "params": _layout({"params": state.get("params")}),
            "buffers": _layout(state.get("buffers", {})),
            "algorithm_state": _layout(state.get("algorithm_state", {})),
        }
        for key, expected in mine.items():
            if theirs[key] != expected:
                raise ValueError(
                    f"state of a server: {key}: got {theirs[key]}, expected {expected}; build this server as that one was"
                )
        if self.assignments.total is not None and state["iteration"] > self.assignments.total:
            raise ValueError(
                f"state of a server: iteration: got {state['iteration']}, expected at most {self.assignments.total}"
            )
        self.algorithm.params = self.algorithm.empty().copy_(state["params"])  # others may still read the former ones
        self.algorithm.load_state_dict(state["algorithm_state"])
        self.buffers.load_state_dict(state["buffers"])
        self.iteration = state["iteration"]
        self.incarnation = state["incarnation"]
        self.buckets = Buckets(*state["buckets"])
        self.newest_bucket = state["newest_bucket"]
        total = self.assignments.total
        self.assignments = Assignments.from_state(state["assignments"], self.assignments.process_of)
        self.assignments.total = total
        diverged = state["status"] == Status.diverged.value
        self.status = Status.diverged if diverged else Status.completed if self.assignments.done else Status.running
        self.members = {worker: Member(answered) for worker, answered in state["members"].items()}
        self.blocked = list(state["blocked"])
        self.idle = list(state["idle"])
        for values in state["replies"]:
            self.members[values["worker"]].reply = Reply(**values)
        self.paused = state["paused"]
        self.scheduler.load_state_dict(state["scheduler_state"])
        self.scheduler.generator.set_state(state["scheduler_generator"])
        self.started = True
        self.forget_snapshots()


def _layout(values: Mapping[str, Any]) -> dict[str, str]:
    """What is under each name: dtype and shape of a tensor, "number" otherwise; what is kept for each worker comes and goes."""
    return {
        k: f"{v.dtype} {tuple(v.shape)}" if isinstance(v, Tensor) else "number"
        for k, v in sorted(values.items())
        if "/" not in k
    }
