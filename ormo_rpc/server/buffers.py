"""The buffers of the model on the server, and how what pushes report of them enters, in the order of their application."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch

from ormo_rpc.messages import no_buffers
from ormo_rpc.server.buffer_layout import BufferLayout


class RuleKind(Enum):
    """The way in which what a push reports of a buffer enters the server's."""

    average = "average"
    """Running statistics of a batch norm: averaged with the statistics of its calls."""
    count = "count"
    """The number of calls of a batch norm: those of the push are added."""
    newest = "newest"
    """Anything else that a forward pass may write: the newest push's value replaces it."""


@dataclass(frozen=True, slots=True)
class Rule:
    """The rule of one buffer.

    A push reports for an average the mean ``B`` of the statistics of the norm's n calls for its ticket, weighted as the norm
    weights them, and the server does what the norm would have done: ``r <- (1 - W) r + W B`` with ``W = 1 - (1 - m)^n``, or
    ``W = n / (N + n)`` where the norm averages over all of its N + n calls.

    Attributes:
        kind: How it is changed.
        momentum: m of an average; None for the mean of all calls.
        count: The name of the buffer that counts the calls of an average; without one, every push is one call.
        variance: It is a variance, so never negative.
    """

    kind: RuleKind = RuleKind.newest
    momentum: float | None = None
    count: str | None = None
    variance: bool = False

    def __post_init__(self) -> None:
        if self.kind is RuleKind.average and self.momentum is None and self.count is None:
            raise ValueError("buffers: got an average without momentum and count, expected one of them")

    def weight(self, calls: int, before: int = 0) -> float:
        """The weight W of these calls of an average, after so many."""
        if self.momentum is None:
            return calls / (before + calls) if calls else 0.0
        return self.momentum if calls == 1 else 1 - (1 - self.momentum) ** calls


NEWEST = Rule()


class RunningBuffers:
    """The present buffers, as training has left them.

    Args:
        initial: The buffers at the start by name; copied.
        rules: The rule of each; the newest value counts for those that have none here.

    Attributes:
        current: The buffers by name: to be read only, and at once, as the next push may change them.
        layout: Their places among the bytes of a snapshot.
    """

    def __init__(self, initial: Mapping[str, torch.Tensor], rules: Mapping[str, Rule] | None = None) -> None:
        self.layout = BufferLayout(initial)
        self.rules: dict[str, Rule] = {name: (rules or {}).get(name, NEWEST) for name in initial}
        self._bytes = self.layout.pack(initial)
        self.current = self.layout.views(self._bytes)
        self._snapshot: torch.Tensor | None = None

    def update(self, reported: Mapping[str, torch.Tensor]) -> None:
        """Take over what one push reports: buffers by name, of the dtypes and shapes of the current ones."""
        if not reported:
            return
        with torch.no_grad():
            self._snapshot = None
            averages: dict[float, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
            counts: list[tuple[torch.Tensor, torch.Tensor]] = []
            for name, value in reported.items():
                rule, mine = self.rules[name], self.current[name]
                if rule.kind is RuleKind.newest:
                    mine.copy_(value)
                elif rule.kind is RuleKind.count:
                    counts.append((mine, value))
                else:
                    into, values = averages.setdefault(self._weight(rule, reported), ([], []))
                    into.append(mine)
                    values.append(value)
            for weight, (into, values) in averages.items():  # to the bits of mul_ and add_ one by one, in half the time
                torch._foreach_mul_(into, 1 - weight)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage] # it has no public name
                torch._foreach_add_(into, values, alpha=weight)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage] # as above
            for mine, value in counts:  # afterwards, as cumulative averages need the calls before
                mine.add_(value)

    def _weight(self, rule: Rule, reported: Mapping[str, torch.Tensor]) -> float:
        if rule.count is None:
            return rule.weight(1)
        calls = int(reported[rule.count]) if rule.count in reported else 1
        return rule.weight(calls, int(self.current[rule.count]) if rule.momentum is None else 0)

    def snapshot(self) -> torch.Tensor:
        """Return the buffers as bytes (uint8), which never change: they are shared until the next push that changes one."""
        if not self.current:
            return no_buffers()
        if self._snapshot is None:
            self._snapshot = self._bytes.clone()
        return self._snapshot

    def copy(self) -> dict[str, torch.Tensor]:
        """Return the buffers by name, as they will stay: to be read only."""
        return self.layout.views(self.snapshot())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return a private copy by name; each has memory of its own, as `torch.save` wants for different dtypes."""
        return {name: tensor.clone() for name, tensor in self.current.items()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self._snapshot = None
        for name, mine in self.current.items():
            mine.copy_(state[name])
