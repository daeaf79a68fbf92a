"""The members of a run, and the queues in which they wait for their next ticket."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from typing_extensions import override

from ormo_rpc.errors import RunFailed, StaleSession
from ormo_rpc.messages import Reply
from ormo_rpc.schedulers.base import Scheduler
from ormo_rpc.server.validation import check_whole


@dataclass(slots=True)
class Member:
    """The newest settled push of a worker, as (ticket, stamp, loss scale), and its newest reply unless one is pending."""

    answered: tuple[int, int, float] | None = None
    reply: Reply | None = None


class Members(Mapping[int, Member]):
    """The workers by number. Each one computes or waits in one of two queues.

    A worker that has joined or pushed is *blocked* until the scheduler releases it, and then *idle* until there is a ticket for
    it and the algorithm does not hold it, or the run ends.

    Args:
        scheduler: Decides when a worker is released; it is told who joins, pushes and leaves.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.blocked: list[int] = []
        self.idle: list[int] = []
        self._members: dict[int, Member] = {}

    @override
    def __getitem__(self, worker: int) -> Member:
        return self._members[worker]

    @override
    def __iter__(self) -> Iterator[int]:
        return iter(self._members)

    @override
    def __len__(self) -> int:
        return len(self._members)

    @override
    def __contains__(self, worker: object) -> bool:
        return worker in self._members

    def start(self, workers: Sequence[int]) -> None:
        """Begin with these members, all blocked and without a past."""
        self._members = {worker: Member() for worker in workers}
        self.scheduler.start(self._members)
        self.blocked, self.idle = list(workers), []

    def join(self, worker: int) -> None:
        """Add a member, blocked.

        Raises:
            ValueError: it is a member already, or its number is negative or no whole number.
        """
        check_whole(worker, "join: worker", ValueError)
        if worker in self._members:
            raise ValueError(f"join of worker {worker}: it is a member already; let it leave first, or use another number")
        if worker < 0:
            raise ValueError(f"join: got worker {worker}, expected a number >= 0")
        self._members[worker] = Member()
        self.blocked.append(worker)
        self.scheduler.join(worker)

    def leave(self, worker: int) -> None:
        """Remove a member.

        Raises:
            ValueError: it is not a member.
        """
        check_whole(worker, "leave: worker", ValueError)
        if worker not in self._members:
            raise ValueError(f"leave of worker {worker}: it is not a member; members are {sorted(self._members)}")
        del self._members[worker]
        self.scheduler.leave(worker)
        for queue in (self.blocked, self.idle):
            if worker in queue:
                queue.remove(worker)

    def settle(self, worker: int) -> None:
        """Block the sender of a settled push."""
        self.blocked.append(worker)
        self.scheduler.settle(worker)

    def take_back(self, worker: int) -> None:
        """Block a worker whose ticket was taken back."""
        self.blocked.append(worker)
        self._members[worker].reply = None

    def release(self, holding: Collection[int], *, everyone: bool) -> None:
        """Move the workers that are due, or everyone, from blocked to idle.

        Args:
            holding: Workers that hold a ticket.
            everyone: The run has ended, and the scheduler is not asked.

        Raises:
            RunFailed: the scheduler releases others than those that are blocked, or nobody although nobody computes.
        """
        released = self.blocked if everyone else self.scheduler.due(self.blocked, holding)
        if released:
            answered = set(released)
            rest = [worker for worker in self.blocked if worker not in answered]
            if len(rest) + len(released) != len(self.blocked):
                raise RunFailed(
                    f"scheduler {self.scheduler.name}: due returned {released}, expected workers of {self.blocked}, each once"
                )
            self.idle.extend(released)
            self.blocked = rest
        elif self.blocked and not self.idle and not holding:
            raise RunFailed(
                f"scheduler {self.scheduler.name}: due returned nobody although no worker computes, expected at least one of "
                f"{self.blocked}"
            )

    def answer(self, reply: Reply) -> None:
        """Take an idle worker out of its queue, and remember its reply."""
        self.idle.remove(reply.worker)
        self._members[reply.worker].reply = reply

    def newest_reply(self, worker: int) -> list[Reply]:
        """Return the newest reply of a worker; nothing while it is pending.

        Raises:
            StaleSession: the server's state was saved without it.
        """
        reply = self._members[worker].reply
        if reply is not None:
            return [reply]
        if worker not in self.blocked and worker not in self.idle:
            raise StaleSession(f"push of worker {worker}: its newest reply was lost when the server's state was loaded; rejoin")
        return []

    def state_dict(self, *, replies: bool) -> dict[str, Any]:
        """Return members and queues as plain values, with the newest replies if asked to."""
        kept = [member.reply for member in self.values() if member.reply is not None] if replies else []
        return {
            "members": {worker: member.answered for worker, member in self.items()},
            "blocked": list(self.blocked),
            "idle": list(self.idle),
            "replies": [{field.name: getattr(reply, field.name) for field in fields(reply)} for reply in kept],
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore what `state_dict` returned, with the tensors of replies on a device."""
        self._members = {worker: Member(answered) for worker, answered in state["members"].items()}
        self.blocked = list(state["blocked"])
        self.idle = list(state["idle"])
        for values in state["replies"]:
            reply = Reply(**values)
            there = replace(reply, params=reply.params.to(device), buffers=reply.buffers.to(device))
            self._members[reply.worker].reply = there
