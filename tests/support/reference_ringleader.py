"""A reference implementation of Ringleader ASGD, with lists of gradients; the legend is that of `tests.support.reference`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tests.support.reference import Reference, Values
from tests.support.reference_batching import ended
from tests.support.schedule import Step

Table = dict[int, list[Tensor]]


class Ringleader(Reference):
    """The two phases over all calls, each table a list of gradients for each worker that ever got a ticket and is there."""

    def state(self, history: Sequence[Step]) -> Values:
        w, present, following = self.start, Table(), Table()
        waiting: set[int] = set()
        flushed, t = False, 0
        for step in history:
            worker = step.worker
            if step.kind == "leave":
                present.pop(worker, None)
                following.pop(worker, None)
                if waiting == {worker}:
                    present, following = following, {each: [] for each in present}
                waiting.discard(worker)
            if step.push is not None:
                begins = not waiting
                if begins or worker in waiting:
                    present[worker].append(step.push.grad)
                else:
                    following[worker].append(step.push.grad)
                if begins and all(present.values()):
                    waiting = set(present)
                if worker in waiting:
                    w = w - self.lr(t) * mean(present) / sum(map(bool, present.values()))
                    waiting.remove(worker)
                    if not waiting:
                        present, following = following, {each: [] for each in present}
                t += 1
            if ended([step]) and not flushed:
                flushed, rest = True, following if waiting else present
                w = w - self.lr(t - 1) * mean(rest) / max(len(rest), 1)
                waiting = set()
                present, following = ({each: list[Tensor]() for each in rest} for _ in range(2))
            for reply in step.replies:
                if reply.ticket is not None and reply.worker not in present:
                    present[reply.worker], following[reply.worker] = [], []
        return {
            "w": w,
            "total": (mean(present) if waiting else torch.zeros(())) + torch.zeros_like(w),
            **self.entries("means", "counts", present),
            **self.entries("next_means", "next_counts", following),
            **{f"due/{worker}": int(worker in waiting) for worker in present},
        }

    def entries(self, means: str, counts: str, table: Mapping[int, list[Tensor]]) -> Values:
        """Return a table as the state has it."""
        zero = torch.zeros_like(self.start)
        return {
            **{f"{means}/{worker}": mean({worker: each}) + zero for worker, each in table.items()},
            **{f"{counts}/{worker}": len(each) for worker, each in table.items()},
        }

    def scale(self, history: Sequence[Step]) -> float:
        return super().scale(history) + sum(float(s.push.grad.abs().max()) for s in history if s.push is not None)


def mean(table: Mapping[int, list[Tensor]]) -> Tensor:
    """Return the sum over the workers of their means; a scalar 0 for none."""
    return sum((torch.stack(each).mean(0) for each in table.values() if each), torch.zeros(()))
