"""Reference implementations of the synchronous algorithms; the legend is that of `tests.support.reference`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ormo_rpc.messages import Push
from tests.support.reference import Reference, Values
from tests.support.schedule import Step


@dataclass
class Round:
    """The pushes of a round, and the number of those of the rounds before it."""

    begins: int
    pushes: list[Push] = field(default_factory=list[Push])

    @property
    def ends(self) -> int:
        """Return the number of pushes up to its end."""
        return self.begins + len(self.pushes)

    def total(self, zero: Tensor) -> Tensor:
        """Return the sum of its pushes."""
        return sum((push.grad for push in self.pushes), zero)


class Rounds(Reference):
    """With ``d_r`` the mean of round r and n rounds done: ``v = sum of mu^(n-1-r) d_r``, ``w`` the sum of the steps."""

    def rounds(self, history: Sequence[Step]) -> list[Round]:
        """Return all rounds, the unfinished one last, which may be empty."""
        found = [Round(0)]
        members, brought, holding = set(range(self.num_workers)), set[int](), set[int]()
        for step in history:
            if step.kind == "join":
                members.add(step.worker)
            if step.kind == "leave":
                for group in (members, brought):
                    group.discard(step.worker)
            holding.discard(step.worker)
            if step.push is not None and step.push.stamp >= found[-1].begins:
                found[-1].pushes.append(step.push)
                brought.add(step.worker)
            count = len(found[-1].pushes)
            stopped = any(reply.ticket is None for reply in step.replies)
            nobody_computes = not holding and members <= brought
            if count and (count == self.options.get("m") or members <= brought or nobody_computes or stopped):
                found.append(Round(found[-1].ends))
                brought.clear()
                if self.options.get("cancel"):
                    holding.clear()
            holding |= {reply.worker for reply in step.replies if reply.ticket is not None}
        return found

    name: str
    """The momentum's name in the state."""

    @property
    @abstractmethod
    def mu(self) -> float:
        """Return the momentum of the means."""

    @property
    @abstractmethod
    def nesterov(self) -> bool:
        """Tell if it is Nesterov momentum."""

    @abstractmethod
    def outer(self, round_: Round) -> float:
        """Return the rate of a round's step."""

    def state(self, history: Sequence[Step]) -> Values:
        zero = torch.zeros_like(self.start)
        *done, last = self.rounds(history)
        w, means = self.start, [round_.total(zero) / len(round_.pushes) for round_ in done]
        for r, round_ in enumerate(done):
            v = self.momentum(means[: r + 1])
            w = w - self.outer(round_) * (means[r] + self.mu * v if self.nesterov else v)
        kept = {"collected": last.total(zero), "count": len(last.pushes), "version": len(done)}
        return {"w": w, self.name: self.momentum(means), **kept}

    def momentum(self, means: Sequence[Tensor]) -> Tensor:
        """``sum of mu^(n-1-r) d_r``."""
        return sum((self.mu ** (len(means) - 1 - r) * mean for r, mean in enumerate(means)), torch.zeros_like(self.start))

    def scale(self, history: Sequence[Step]) -> float:
        sizes = [float(step.push.grad.abs().max()) for step in history if step.push is not None]
        return super().scale(history) + sum(sizes) / (1 - self.mu) * (2 + max(map(self.outer, self.rounds(history))))


class MSync(Rounds):
    """The mean gradient of the first m workers; the learning rate of the round's last gradient."""

    name = "v"

    @property
    def mu(self) -> float:
        return self.beta

    @property
    def nesterov(self) -> bool:
        return self.options.get("nesterov", False)

    def outer(self, round_: Round) -> float:
        return self.lr(max(round_.ends - 1, 0))


class LocalSGD(Rounds):
    """The mean displacement of all workers, and the outer optimizer's constants."""

    name = "u"

    @property
    def mu(self) -> float:
        return self.options.get("outer_momentum", 0.0)

    @property
    def nesterov(self) -> bool:
        return self.options.get("outer_nesterov", True)

    def outer(self, round_: Round) -> float:
        return self.options.get("outer_lr", 1.0)
